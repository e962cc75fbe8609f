"""The only file that is a notebook: it gives each panel's widgets a name, so that marimo knows what to run again.

`rmsnorm learn` serves it; `python notebook.py --lang zh` runs it as a script, `marimo edit notebook.py` opens it.
"""

import marimo

app = marimo.App(width="full", app_title="RMSNorm", css_file="style.css")


@app.cell
def _():
    import marimo as mo

    from rmsnorm.tutorial import texts, widgets

    return mo, texts, widgets


@app.cell
def _(mo, texts, widgets):
    wanted = mo.query_params().get("lang") or mo.cli_args().get("lang")
    switch = widgets.language(wanted if wanted in texts.LANGUAGES else texts.of_locale())
    return (switch,)


@app.cell
def _(switch, widgets):
    widgets.head(switch)
    return


@app.cell
def _(switch, widgets):
    ruler = widgets.controls("ruler", switch.value)
    widgets.ask("ruler", ruler, switch.value)
    return (ruler,)


@app.cell
def _(ruler, switch, widgets):
    widgets.show("ruler", ruler, switch.value)
    return


@app.cell
def _(switch, widgets):
    dial = widgets.controls("dial", switch.value)
    widgets.ask("dial", dial, switch.value)
    return (dial,)


@app.cell
def _(dial, switch, widgets):
    widgets.show("dial", dial, switch.value)
    return


@app.cell
def _(switch, widgets):
    layer = widgets.controls("layer", switch.value)
    widgets.ask("layer", layer, switch.value)
    return (layer,)


@app.cell
def _(layer, switch, widgets):
    widgets.show("layer", layer, switch.value)
    return


@app.cell
def _(switch, widgets):
    zero = widgets.controls("zero", switch.value)
    widgets.ask("zero", zero, switch.value)
    return (zero,)


@app.cell
def _(zero, switch, widgets):
    widgets.show("zero", zero, switch.value)
    return


@app.cell
def _(switch, widgets):
    invariance = widgets.controls("invariance", switch.value)
    widgets.ask("invariance", invariance, switch.value)
    return (invariance,)


@app.cell
def _(invariance, switch, widgets):
    widgets.show("invariance", invariance, switch.value)
    return


@app.cell
def _(switch, widgets):
    gradient = widgets.controls("gradient", switch.value)
    widgets.ask("gradient", gradient, switch.value)
    return (gradient,)


@app.cell
def _(gradient, switch, widgets):
    widgets.show("gradient", gradient, switch.value)
    return


@app.cell
def _(switch, widgets):
    precision = widgets.controls("precision", switch.value)
    widgets.ask("precision", precision, switch.value)
    return (precision,)


@app.cell
def _(precision, switch, widgets):
    widgets.show("precision", precision, switch.value)
    return


@app.cell
def _(switch, widgets):
    depth = widgets.controls("depth", switch.value)
    widgets.ask("depth", depth, switch.value)
    return (depth,)


@app.cell
def _(depth, switch, widgets):
    widgets.show("depth", depth, switch.value)
    return


@app.cell
def _(switch, widgets):
    cost = widgets.controls("cost", switch.value)
    widgets.ask("cost", cost, switch.value)
    return (cost,)


@app.cell
def _(cost, switch, widgets):
    widgets.show("cost", cost, switch.value)
    return


if __name__ == "__main__":
    app.run()
