"""The only file that is a notebook: it gives each panel's widgets names, so that marimo knows what to run again.

Three cells for each panel: the question with its widgets, what is measured with them, and the answer. `rmsnorm learn`
serves it; `python notebook.py --lang zh` runs it as a script, `marimo edit notebook.py` opens it.
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


@app.cell
def _(switch, widgets):
    ruler_guess = widgets.guess("ruler", switch.value)
    ruler = widgets.dials("ruler", switch.value)
    widgets.ask("ruler", switch.value, ruler_guess, ruler)
    return ruler_guess, ruler


@app.cell
def _(ruler, switch, widgets):
    widgets.show("ruler", switch.value, ruler)


@app.cell
def _(ruler_guess, switch, widgets):
    widgets.answer("ruler", switch.value, ruler_guess)


@app.cell
def _(switch, widgets):
    dial_guess = widgets.guess("dial", switch.value)
    dial = widgets.dials("dial", switch.value)
    widgets.ask("dial", switch.value, dial_guess, dial)
    return dial_guess, dial


@app.cell
def _(dial, switch, widgets):
    widgets.show("dial", switch.value, dial)


@app.cell
def _(dial_guess, switch, widgets):
    widgets.answer("dial", switch.value, dial_guess)


@app.cell
def _(switch, widgets):
    layer_guess = widgets.guess("layer", switch.value)
    layer = widgets.dials("layer", switch.value)
    widgets.ask("layer", switch.value, layer_guess, layer)
    return layer_guess, layer


@app.cell
def _(layer, switch, widgets):
    widgets.show("layer", switch.value, layer)


@app.cell
def _(layer_guess, switch, widgets):
    widgets.answer("layer", switch.value, layer_guess)


@app.cell
def _(switch, widgets):
    zero_guess = widgets.guess("zero", switch.value)
    zero = widgets.dials("zero", switch.value)
    widgets.ask("zero", switch.value, zero_guess, zero)
    return zero_guess, zero


@app.cell
def _(switch, widgets, zero):
    widgets.show("zero", switch.value, zero)


@app.cell
def _(zero_guess, switch, widgets):
    widgets.answer("zero", switch.value, zero_guess)


@app.cell
def _(switch, widgets):
    invariance_guess = widgets.guess("invariance", switch.value)
    invariance = widgets.dials("invariance", switch.value)
    widgets.ask("invariance", switch.value, invariance_guess, invariance)
    return invariance_guess, invariance


@app.cell
def _(invariance, switch, widgets):
    widgets.show("invariance", switch.value, invariance)


@app.cell
def _(invariance_guess, switch, widgets):
    widgets.answer("invariance", switch.value, invariance_guess)


@app.cell
def _(switch, widgets):
    gradient_guess = widgets.guess("gradient", switch.value)
    gradient = widgets.dials("gradient", switch.value)
    widgets.ask("gradient", switch.value, gradient_guess, gradient)
    return gradient_guess, gradient


@app.cell
def _(gradient, switch, widgets):
    widgets.show("gradient", switch.value, gradient)


@app.cell
def _(gradient_guess, switch, widgets):
    widgets.answer("gradient", switch.value, gradient_guess)


@app.cell
def _(switch, widgets):
    precision_guess = widgets.guess("precision", switch.value)
    precision = widgets.dials("precision", switch.value)
    widgets.ask("precision", switch.value, precision_guess, precision)
    return precision_guess, precision


@app.cell
def _(precision, switch, widgets):
    widgets.show("precision", switch.value, precision)


@app.cell
def _(precision_guess, switch, widgets):
    widgets.answer("precision", switch.value, precision_guess)


@app.cell
def _(switch, widgets):
    depth_guess = widgets.guess("depth", switch.value)
    depth = widgets.dials("depth", switch.value)
    depth_button = widgets.button("depth", switch.value)
    widgets.ask("depth", switch.value, depth_guess, depth, depth_button)
    return depth_guess, depth, depth_button


@app.cell
def _(depth, depth_button, switch, widgets):
    widgets.show("depth", switch.value, depth, depth_button)


@app.cell
def _(depth_guess, switch, widgets):
    widgets.answer("depth", switch.value, depth_guess)


@app.cell
def _(switch, widgets):
    cost_guess = widgets.guess("cost", switch.value)
    cost = widgets.dials("cost", switch.value)
    cost_button = widgets.button("cost", switch.value)
    widgets.ask("cost", switch.value, cost_guess, cost, cost_button)
    return cost_guess, cost, cost_button


@app.cell
def _(cost, cost_button, switch, widgets):
    widgets.show("cost", switch.value, cost, cost_button)


@app.cell
def _(cost_guess, switch, widgets):
    widgets.answer("cost", switch.value, cost_guess)


if __name__ == "__main__":
    app.run()
