"""The only file that makes the site: the pages of this repository and the reference, in English and in Chinese.

``make docs`` runs it. The pages are written to be read on GitHub as well, so they are staged first, in a folder
of their own: links get the targets that they have in the site, and what commands mark loses its marks. Both sites are
whole: where a page has no translation, the Chinese one has it in English, and says so in the navigation and on top of
the page.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
LANGUAGES = {"en": "", "zh": "zh"}  # and where each is in the site
TRANSLATIONS = {"README.md": "README.zh-CN.md", "docs/explained.md": "docs/explained.zh.md"}
TRANSLATIONS |= {"docs/tasks.md": "docs/tasks.zh.md", "docs/surgery.md": "docs/surgery.zh.md"}

# The navigation: parts, and their pages with a title in both languages. Pages of docs/ that it doesn't name come last.
PARTS = [
    (("Start", "开始"), {"README.md": ("What it is", "简介"), "docs/tasks.md": ("Common tasks", "常见任务")}),
    (("Learn", "学习"), {"docs/explained.md": ("RMSNorm explained", "RMSNorm 详解")}),
    (
        ("Use", "使用"),
        {
            "reference": ("Reference", "API 参考"),
            "docs/models.md": ("Models", "替换模型"),
            "docs/surgery.md": ("Exact surgery", "精确改造"),
            "docs/hub.md": ("Hugging Face's kernels hub", "Hugging Face kernels"),
            "docs/gpu.md": ("GPUs", "GPU"),
            "docs/scaling.md": ("Sharded tensors", "多进程扩展"),
            "docs/versions.md": ("Versions", "版本"),
            "examples/README.md": ("Examples", "示例程序"),
        },
    ),
    (
        ("Evidence", "证据"),
        {
            "docs/numerics.md": ("The numerics contract", "数值约定"),
            "docs/performance.md": ("Performance", "性能"),
            "docs/performance/tables.md": ("Every measured number", "全部测量数据"),
            "docs/performance/neighbours.md": ("The neighbourhood, form by form", "邻域：逐个形式"),
            "docs/performance/log.md": ("What was tried for speed", "性能试验记录"),
            "docs/home.md": ("What torch does to a norm", "与 torch 的行为对照"),
            "docs/study/README.md": ("More stable training?", "训练更稳定？"),
            "findings/README.md": ("Findings", "意外的发现"),
        },
    ),
    (
        ("Inside", "内部"),
        {
            "docs/design.md": ("Design", "为什么这样设计"),
            "docs/releasing.md": ("Releasing", "发布"),
            "CONTRIBUTING.md": ("Contributing", "参与贡献"),
            "CHANGELOG.md": ("Changes", "变更记录"),
        },
    ),
]
IN_ENGLISH = "（英文）"
"""Behind the titles, in the Chinese navigation, of pages that exist in English only."""
NOTICE = "> 本页目前只有英文版。"
REFERENCE = {
    ("Functions", "函数"): [
        *("rms_norm", "add_rms_norm", "rms_norm_add", "sandwich_rms_norm", "gated_rms_norm", "layer_norm"),
        *("add_rms_norm_", "l2_norm", "inverse_rms"),
        *("quantised_rms_norm", "heads_rms_norm_rope", "rope", "modulated_norm", "gated_add"),
    ],
    ("Layers", "层"): ["RMSNorm", "GatedRMSNorm", "LayerNorm"],
    ("Models", "模型"): ["patch", "patched", "unpatch", "PatchReport", "models.report.Entry"],
    ("Exact surgery", "精确改造"): [
        *("fold", "to_rms", "rotate", "unfold"),
        *("surgery.SurgeryReport", "surgery.report.Fate", "surgery.report.Difference", "surgery.SurgeryError"),
        "surgery.load",
    ],
    ("torch's own operator", "torch 自己的算子"): ["install", "installed", "uninstall"],
    ("torch.compile", "torch.compile"): ["set_compile_mode"],
    ("What runs here", "运行环境"): ["info", "_info.Info"],
    ("Hugging Face's kernels hub", "Hugging Face kernels"): ["hub.register", "hub.unregister", "hub.mapping"],
}
_LINK = re.compile(r"(\]\()([^)\s]+)(\))|(^\[\w+\]: )(\S+)()$", re.MULTILINE)
_CODE = re.compile(r"(?s:^```.*?^```$)|(?<=\n\n)(?: {4}.*\n)+", re.MULTILINE)
_MARK = re.compile(r"^<!-- .* -->$", re.MULTILINE)


def staged(page: str) -> str:
    """Where a page of the repository stands in a site, as Markdown."""
    name = next((english for english, chinese in TRANSLATIONS.items() if chinese == page), page)
    return {"README.md": "index.md", "docs/study/README.md": "study/index.md", "reference": "reference.md"}.get(
        name, name.removeprefix("docs/").replace("/README.md", ".md")
    )


def slug(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def target(page: str, link: str, language: str, assets: set[str]) -> str:
    """What a link of a page becomes. Files that are no pages are copied: ``assets`` are those so far."""
    path, _, anchor = link.partition("#")
    if re.match(r"\w+:", link) or not path:
        return link
    goal = os.path.normpath(Path(page).parent / path)
    if (ROOT / goal).is_dir():
        goal = f"{goal}/README.md"
    if not (ROOT / goal).is_file():
        raise SystemExit(f"{page}: ({link}) leads to no file")
    here = Path(staged(page)).parent
    if re.fullmatch(r"examples/\w+\.py", goal):
        goal, anchor = "examples/README.md", slug(Path(goal).name)
    if goal.endswith(".md") and goal in pages():
        other = "zh" if goal in TRANSLATIONS.values() else "en" if goal in TRANSLATIONS else language
        there = staged(goal)
        if other != language:  # past Zensical, which looks for pages of its own site
            there = os.path.join(LANGUAGES["zh"] if other == "zh" else "..", there.removesuffix(".md") + ".html")
    else:
        assets.add(goal)
        there = goal.removeprefix("docs/")
    return os.path.relpath(there, here) + (f"#{anchor}" if anchor else "")


def pages() -> list[str]:
    """All pages, translations too."""
    named = [page for _, part in PARTS for page in part]
    rest = (path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/*.md")))
    translations = list(TRANSLATIONS.values())
    return [*named, *translations, *(page for page in rest if page not in {*named, *translations})]


def untranslated(page: str, language: str) -> bool:
    """Whether a Chinese reader gets this page in English."""
    return language == "zh" and page not in {*TRANSLATIONS, *TRANSLATIONS.values()}


def stage(page: str, language: str, assets: set[str]) -> str:
    """The text of a page, as the site wants it."""
    text = _MARK.sub("", (ROOT / page).read_text())
    if untranslated(page, language):
        text = re.sub(r"^# .*$", lambda title: f"{title[0]}\n\n{NOTICE}", text, count=1, flags=re.MULTILINE)
    if page == "examples/README.md":
        programs = sorted(ROOT.glob("examples/*.py"))
        text += "".join(f"\n## {path.name}\n\n```python\n{path.read_text()}```\n" for path in programs)
    parts, end = [], 0
    for code in [*_CODE.finditer(text), None]:  # links in code are no links
        prose = text[end : code.start()] if code else text[end:]
        parts.append(
            _LINK.sub(
                lambda m: (m[1] or m[4]) + target(page, m[2] or m[5], language, assets) + (m[3] or ""),
                prose,
            )
        )
        if code:
            parts.append(code[0])
            end = code.end()
    return "".join(parts)


def reference(language: str) -> str:
    """The page that mkdocstrings fills from the docstrings."""
    index = language == "zh"
    title = ("Reference", "API 参考")[index]
    before = ("The examples have done this before:", "示例之前都已执行：")[index]
    lines = [
        f"# {title}",
        *([NOTICE] * index),
        before,
        "```python\nimport torch\nimport rmsnorm.hub\nfrom rmsnorm import *\n```",
    ]
    for heading, names in REFERENCE.items():
        lines += [f"## {heading[index]}", *(f"::: rmsnorm.{name}" for name in names)]
    return "\n\n".join(lines) + "\n"


def settings(language: str) -> dict[str, object]:
    """Zensical's, in the words of mkdocs.yml: MkDocs with its Material theme builds the same pages of them."""
    index = language == "zh"
    named = {page for _, part in PARTS for page in part} | {*TRANSLATIONS.values()}
    nav = [
        {part[index]: [{title[index] + IN_ENGLISH * untranslated(page, language): staged(page)} for page, title in ps]}
        for part, ps in ((part, titled.items()) for part, titled in PARTS)
    ]
    nav[-1][PARTS[-1][0][index]] += [staged(page) for page in pages() if page not in named]
    alternate = [{"name": "English", "lang": "en", "link": "../index.html" if index else "./index.html"}]
    alternate += [{"name": "简体中文", "lang": "zh", "link": "./index.html" if index else "./zh/index.html"}]
    options = {
        "docstring_style": "google",
        "docstring_section_style": "list",  # a table calls every parameter required whose default it can't find
        "merge_init_into_class": True,
        "docstring_options": {
            "warn_unknown_params": False,  # parameters share lines; tests/test_reference.py checks their names
            "warn_missing_types": False,
            "returns_multiple_items": False,
            "returns_named_value": False,
        },
        "extensions": [str(HERE / "roles.py")],
        "heading_level": 3,
        "members_order": "source",
        "filters": ["!^_", "!^(extra_repr|reset_parameters)$"],
        "separate_signature": True,
        "show_root_heading": True,
        "show_root_full_path": True,
        "show_signature_annotations": True,
        "show_source": False,
    }
    return {
        "site_name": "rmsnorm",
        "docs_dir": "docs",
        "site_dir": "site",
        "use_directory_urls": False,
        "copyright": "Apache-2.0",
        "theme": {
            "name": "material",
            "language": language,
            "font": False,
            "features": [
                "navigation.sections",
                "navigation.footer",
                "toc.follow",
                "content.code.copy",
                "search.highlight",
            ],
            "palette": [
                {"media": "(prefers-color-scheme: light)", "scheme": "default"},
                {"media": "(prefers-color-scheme: dark)", "scheme": "slate"},
            ],
        },
        "extra": {"alternate": alternate, "polyfills": ["iframe-worker.js"], "generator": False},
        "plugins": [
            "search",
            "offline",
            {"mkdocstrings": {"handlers": {"python": {"paths": [str(ROOT / "src")], "options": options}}}},
        ],
        "markdown_extensions": [
            "tables",
            "attr_list",
            {"toc": {"permalink": True, "slugify": {"object": "pymdownx.slugs.slugify", "kwds": {"case": "lower"}}}},
            "pymdownx.superfences",
            "pymdownx.highlight",
        ],
        "nav": nav,
    }


def build(site: Path, staging: Path) -> None:
    """Both languages, staged in an empty folder; the site takes the place of the one before when all of it is built."""
    for language, place in LANGUAGES.items():
        folder, assets = staging / (language + ".pages"), set[str]()
        for page in pages():
            if page in (TRANSLATIONS if language == "zh" else TRANSLATIONS.values()):
                continue
            file = folder / "docs" / staged(page)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(reference(language) if page == "reference" else stage(page, language, assets))
        for asset in assets:
            copy = folder / "docs" / asset.removeprefix("docs/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / asset, copy)
        shutil.copy(HERE / "iframe-worker.js", folder / "docs")
        (folder / "mkdocs.yml").write_text(json.dumps(settings(language), ensure_ascii=False))
        command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", str(folder / "mkdocs.yml")]
        if subprocess.run(command, check=False, env={**os.environ, "NO_COLOR": "1"}).returncode:
            raise SystemExit(f"the {language} pages can't be built; what is wrong stands above")
        shutil.copytree(folder / "site", staging / "site" / place, dirs_exist_ok=True)  # Zensical writes nowhere else
    shutil.rmtree(site, ignore_errors=True)
    site.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(staging / "site", site)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="rmsnorm-pages-") as own:  # two runs at once stay out of each other's way
        build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "site").absolute(), Path(own))
