"""The only file that draws conclusions: sentences that follow from the numbers, whichever way they fall.

A difference counts if zero is outside its 95 % band over paired seeds; otherwise it is within noise, and is said to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from . import preface
from .results import Study
from .summary import Arm, Spread, arms_of, difference

Arms = dict[str, Arm]


def conclusions(study: Study) -> list[str]:
    """What the study shows, in plain sentences."""
    if not study.complete:
        return ["The study is unfinished: there is nothing to conclude yet."]
    arms = arms_of(study)
    if study.setting.rehearsal:
        return [preface.REHEARSAL, *filter(None, (about(study, arms) for about in REHEARSED))]
    return [sentence for about in ABOUT if (sentence := about(study, arms))]


def verdict(spread: Spread) -> str:
    """What a difference of losses means for the first of the two."""
    if math.isnan(spread.band):
        return "too few seeds to say"
    if spread.noise:
        return "within noise"
    return "worse" if spread.mean > 0 else "better"


def less_rms(arm: Arm, arms: Arms, *, rehearsal: bool = False) -> str:
    """An arm's loss less that of RMSNorm with its band, and what it means; for a cell of a table. A rehearsal's means
    nothing."""
    apart = difference(arm, arms["rms"]) if "rms" in arms and arm.name != "rms" else None
    if not apart or not apart.values:
        return ""
    return apart.signed if rehearsal else f"{apart.signed}, {verdict(apart)}"


def _loss(study: Study, arms: Arms) -> str:
    if not {"rms", "layer"} <= arms.keys():
        return ""
    apart = difference(arms["rms"], arms["layer"])
    return (
        f"Loss: RMSNorm − LayerNorm = {apart.signed} nats per byte held out ({len(apart.values)} paired seeds, each "
        f"arm at its own best rate): {verdict(apart)}."
    )


def _others(study: Study, arms: Arms) -> str:
    if "rms" not in arms:
        return ""
    others = [arm for arm in arms.values() if arm.name not in ("rms", "layer", "none")]
    spreads = {arm.title: difference(arm, arms["rms"]) for arm in others}
    parts = [f"{title} {spread.signed} ({verdict(spread)})" for title, spread in spreads.items() if spread.values]
    parts += [f"{title}: no run to compare" for title, spread in spreads.items() if not spread.values]
    return f"The others, less RMSNorm: {'; '.join(parts)}." if parts else ""


def rate(arm: Arm) -> str:
    """The largest stable rate, in words."""
    if arm.largest_stable is None:
        return "none"
    return f"{'≥ ' if arm.open_end else ''}{arm.largest_stable:g}"


def stability(study: Study, arms: Arms) -> str:
    """The verdict on "more stable" than LayerNorm: "supported", "contradicted", "not supported" or "open"."""
    rms, layer = arms["rms"], arms["layer"]
    if rms.largest_stable is None or layer.largest_stable is None:
        return "open"
    if rms.open_end and layer.open_end:
        return "not supported"
    steps = math.log(rms.largest_stable / layer.largest_stable, study.setting.ratio)
    # One seed, one grid: a single step of it is as far as chance goes.
    return "supported" if steps > 1.5 else "contradicted" if steps < -1.5 else "not supported"


def _stable(study: Study, arms: Arms) -> str:
    text = _rates(study, arms, ", ")
    if {"rms", "layer"} <= arms.keys():
        grid = study.setting.grid()
        bend = {name: arms[name].sensitivity(grid) for name in ("rms", "layer")}
        text += (
            f' "More stable training" than LayerNorm is {stability(study, arms)} by this'
            f" (one step of the grid, with one seed, counts as no difference); over the rates {grid[0]:g} to "
            f"{grid[-1]:g}, RMSNorm loses {bend['rms']:.3f} nats on average against its best, LayerNorm "
            f"{bend['layer']:.3f}."
        )
    return text


def _any_norm(study: Study, arms: Arms) -> str:
    if not {"none", "rms"} <= arms.keys():
        return ""
    without, apart = arms["none"], difference(arms["none"], arms["rms"])
    if without.largest_stable is None:
        return "Without any norm, no rate that was tried trains the model."
    return (
        f"Without any norm the model trains too, up to a rate of {rate(without)} (RMSNorm: {rate(arms['rms'])}), and "
        f"ends {apart.signed} nats from RMSNorm: {verdict(apart)}."
    )


def _batch_norm(study: Study, arms: Arms) -> str:
    if "batch" not in arms or not (batch := arms["batch"]).seeds:
        return ""
    gap, lag = batch.statistics("running", "batch"), batch.statistics("running", "estimated")
    words = {True: "can't be told from zero", False: "is real"}
    others = max((arm.leak("future") for arm in arms.values() if arm.name != "batch" and arm.seeds), default=math.nan)
    rest = "" if math.isnan(others) else f" (all other arms: {others:g})"
    return (
        f"BatchNorm: held-out loss with running statistics less that with the batch's own, {gap.signed}: the gap "
        f"between training and evaluation {words[gap.noise]}; {lag.signed} of it is the lag of the running statistics. "
        "In training it sees the future: changing one byte moves logits before it by up to "
        f"{batch.leak('future'):.2g}, and those of other texts in the batch by up to {batch.leak('others'):.2g}{rest}."
    )


def step_ratios(study: Study) -> tuple[float, float, float] | None:
    """Time of a training step with RMSNorm ÷ with LayerNorm: the median between its quartiles; None without timing."""
    found: tuple[float, float, float] | None
    found = ((study.timing or {}).get("steps", {}).get("rms") or {}).get("ratios", {}).get("layer")
    return found


def computation(study: Study) -> str:
    """The verdict on "less computation" than LayerNorm, of a whole step; "open" without timing."""
    if not (ratios := step_ratios(study)):
        return "open"
    low, _, high = ratios
    return "supported" if high < 1 else "contradicted" if low > 1 else "not supported"


def _cost(study: Study, arms: Arms) -> str:
    if not study.timing or not {"rms", "layer"} <= study.timing["steps"].keys():
        return ""
    steps, norms = study.timing["steps"], study.timing["norms"]
    low, middle, high = steps["rms"]["ratios"]["layer"]
    alone, theirs = norms["rms"]["ratios"]["layer"][1], norms["rms"]["ratios"]["transformers"][1]
    share = {name: norms[name]["median_s"] / steps[name]["median_s"] for name in ("rms", "layer")}
    return (
        f"Cost: a training step with RMSNorm takes {middle:.3f} of the time of one with LayerNorm (quartiles {low:.3f} "
        f'to {high:.3f}): "less computation" is {computation(study)} for the step. Its norms alone, forward and '
        f"backward, are {share['rms']:.1%} of it ({share['layer']:.1%} for LayerNorm) and take {alone:.2f} of the time "
        f"of LayerNorm's, {theirs:.2f} of that of transformers' own LlamaRMSNorm."
    )


def _edges(study: Study, arms: Arms) -> str:
    at_edge = [arm.title for arm in arms.values() if arm.edge]
    failed = [f"{arm.title}: {arm.failed} of {arm.failed + len(arm.seeds)}" for arm in arms.values() if arm.failed]
    text = (
        f"The best rate is at an end of the grid for {', '.join(at_edge)}: one beyond it may do better. "
        if at_edge
        else ""
    )
    text += f"Seeds that diverged at the arm's best rate: {', '.join(failed)}." if failed else ""
    return text.rstrip()


def _losses(study: Study, arms: Arms) -> str:
    """What a rehearsal says of losses: the arms in the order of the table, and which are apart."""
    found = {arm.title: arm.held_out for arm in arms.values() if arm.seeds}
    if not found:
        return "No arm has a run at a best rate."
    rates = {arm.title: arm.best_rate for arm in arms.values()}
    listed = "; ".join(f"{title} {spread} at rate {rates[title]:g}" for title, spread in found.items())
    pairs = [(one, other) for one in found for other in found if not found[one].overlaps(found[other])]
    apart = [f"{one} below {other}" for one, other in pairs if found[one].mean < found[other].mean]
    order = (
        f"Bands apart: {'; '.join(apart)}; all others overlap." if apart else "All bands overlap: no order is given."
    )
    return f"Held-out loss in nats per byte, in the order of --arms: {listed}. {order}"


def _rates(study: Study, arms: Arms, between: str = "; ") -> str:
    rates = between.join(f"{arm.title} {rate(arm)}" for arm in arms.values())
    return f"Largest learning rate that still trains, on a grid of factor {study.setting.ratio:g}: {rates}."


def _step(study: Study, arms: Arms) -> str:
    if not (ratios := step_ratios(study)):
        return ""
    low, middle, high = ratios
    text = f"A training step with {arms['rms'].title} takes {middle:.3f} of the time of one with {arms['layer'].title}"
    return f"{text} (quartiles {low:.3f} to {high:.3f}){': no difference measurable' if low <= 1 <= high else ''}."


REHEARSED: tuple[Callable[[Study, Arms], str], ...] = (_losses, _rates, _step, _edges)
ABOUT: tuple[Callable[[Study, Arms], str], ...] = (_loss, _others, _stable, _any_norm, _batch_norm, _cost, _edges)
