"""The picture that stands in the README: a device at a glance."""

from benchmarks.reporting import capacity, chapters, pictures
from benchmarks.reporting.pictures import Draw
from benchmarks.reporting.results import Results


def panels(results: Results) -> dict[str, Draw]:
    """Return at most four drawings, of the parts that are there."""
    found: dict[str, Draw] = {}
    cases = capacity.sound(results.rows("capacity"))
    for what, drawn in (("memory", pictures.memory), ("speed", pictures.speed)):
        models = drawn(cases)
        name = next((name for name in ("resnet50", *models) if name in models), None)
        if name is not None:
            found[f"{name}: {what} over size"] = models[name]
    for part, title in (("search", "what a search costs"), ("prediction", "predicted peaks")):
        for name, draw in list(chapters.panels(results, part).items())[:1]:
            found[f"{title}: {name}"] = draw
    return found


def stamp(results: Results) -> str:
    """Say what it was measured on, in the picture itself."""
    facts = f"torch {results.fact('torch')}, {results.fact('date')}"
    where = f"{results.stamp}, on {results.device}" if results.stamp else results.device
    return f"{where}; {facts}"
