"""A page that shows a search: parallel coordinates, its history, its learning curves, its trials.

The page needs nothing beside itself: the drawings are SVG, and a few lines of script light up a
trial in all of them. Whatever comes from a Task is escaped.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files

from minga.training.space import Objective, Param
from minga.training.trials import SearchResult, Trial

WIDTH, HEIGHT = 960, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 28, 40
MAX_NAMES = 8
"""So few integers are an axis of their own values, equally far apart."""

Scale = Callable[[float], float]


def search_page(found: SearchResult, objective: Objective, *, title: str) -> str:
    """Write the page of a finished search.

    Args:
        found: the search.
        objective: of the Task.
        title: of the page.
    """
    trials = found.trials
    metric = objective.metric
    values = [value for trial in trials if (value := _value(trial, metric)) is not None]
    best = f"{objective.mode} {metric}: {_figure(found.metrics.get(metric, math.nan))}"
    parts = [
        _section("Hyper-parameters", _coordinates(trials, metric, values, objective)),
        _section("History", _history(trials, metric, objective)),
        _section("Learning curves", _curves(trials, metric)),
        _section("Trials", _table(trials, metric)),
    ]
    template = files(__package__).joinpath("picture.html").read_text(encoding="utf-8")
    counts = ", ".join(
        f"{sum(trial.status == status for trial in trials)} {status}"
        for status in ("finished", "cut", "diverged", "failed")
        if any(trial.status == status for trial in trials)
    )
    facts = f"{len(trials)} trials ({counts}); {best} with {_words(found.params)}"
    page = template.replace("{{title}}", escape(title)).replace("{{facts}}", escape(facts))
    return page.replace("{{body}}", "\n".join(parts))


def _coordinates(
    trials: Sequence[Trial], metric: str, values: Sequence[float], objective: Objective
) -> str:
    """Draw a line for each trial through its hyper-parameters, coloured by the objective."""
    names = sorted({name for trial in trials for name in trial.params})
    names = [name for name in names if len({str(trial.params.get(name)) for trial in trials}) > 1]
    axes = [_Axis(name, [trial.params[name] for trial in trials]) for name in names]
    axes.append(_Axis(metric, list(values) or [0.0]))
    step = (WIDTH - LEFT - RIGHT) / max(1, len(axes) - 1)
    drawn = []
    for trial in sorted(trials, key=lambda trial: _goodness(trial, values, objective)):
        points = [(LEFT + i * step, axis.place(trial.params[axis.name]))
                  for i, axis in enumerate(axes[:-1])]  # fmt: skip
        if (value := _value(trial, metric)) is not None:
            points.append((LEFT + (len(axes) - 1) * step, axes[-1].place(value)))
        drawn.append(_line(points, trial, _colour(_goodness(trial, values, objective))))
    for i, axis in enumerate(axes):
        drawn.append(axis.draw(LEFT + i * step, is_last=i == len(axes) - 1))
    return _svg(drawn)


def _history(trials: Sequence[Trial], metric: str, objective: Objective) -> str:
    """Draw each trial's best value over its number, and the best of all so far."""
    found = [(trial, value) for trial in trials if (value := _value(trial, metric)) is not None]
    x = _linear(1, max(2, len(trials)), LEFT, WIDTH - RIGHT)
    y, frame = _vertical([value for _, value in found], metric)
    drawn, steps, best = [frame, _numbers(x, len(trials), "trial")], [], None
    for trial, value in found:
        if best is None or objective.gain(value, best) > 0:
            if best is not None:
                steps.append((x(trial.number), y(best)))
            best = value
        steps.append((x(trial.number), y(best)))
    drawn.append(f'<polyline class="best" points="{_points(steps)}"/>')
    drawn += [
        f'<circle class="trial" data-trial="{trial.number}" cx="{x(trial.number):.1f}" '
        f'cy="{y(value):.1f}" r="4"><title>{_name(trial)}</title></circle>'
        for trial, value in found
    ]
    return _svg(drawn)


def _curves(trials: Sequence[Trial], metric: str) -> str:
    """Draw the objective of each trial over its epochs."""
    curves = [
        (trial, [(r["epoch"], r[metric]) for r in trial.history if _is_finite(r.get(metric))])
        for trial in trials
    ]
    longest = int(max((points[-1][0] for _, points in curves if points), default=1))
    x = _linear(1, max(2, longest), LEFT, WIDTH - RIGHT)
    y, frame = _vertical([value for _, points in curves for _, value in points], metric)
    lines = [
        _line([(x(epoch), y(value)) for epoch, value in points], trial, "#4a7bb5")
        for trial, points in curves
        if points
    ]
    return _svg([frame, _numbers(x, longest, "epoch"), *lines])


def _table(trials: Sequence[Trial], metric: str) -> str:
    rows = "".join(
        f'<tr class="trial" data-trial="{trial.number}"><td>{trial.number}</td>'
        f"<td>{trial.status}</td><td>{trial.epochs}</td>"
        f"<td>{_figure(_value(trial, metric))}</td><td>{escape(_words(trial.params))}</td></tr>"
        for trial in trials
    )
    heads = "".join(
        f"<th>{escape(name)}</th>"
        for name in ("trial", "status", "epochs", metric, "hyper-parameters")
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


class _Axis:
    """One vertical axis: numbers from low to high, logarithmic over decades, or a list of names."""

    def __init__(self, name: str, values: Sequence[Param]) -> None:
        self.name = name
        self._names: list[str] = []
        few = set(values) if len(set(values)) <= MAX_NAMES else set()
        if few and all(type(value) is int for value in few):
            self._names = [str(value) for value in sorted(few)]
            self._is_log, self._low, self._high = False, 0.0, float(len(self._names) - 1)
        elif all(type(value) in (int, float) for value in values):
            low, high = float(min(values)), float(max(values))
            self._is_log = low > 0 and high / low > 30
            self._low, self._high = (math.log(low), math.log(high)) if self._is_log else (low, high)
        else:
            self._names = sorted({str(value) for value in values})
            self._is_log, self._low, self._high = False, 0.0, float(len(self._names) - 1)
        self._scale = _linear(self._low, self._high, HEIGHT - BOTTOM, TOP)

    def place(self, value: Param) -> float:
        """Give the height of a value."""
        if self._names:
            return self._scale(self._names.index(str(value)))
        number = float(value)
        return self._scale(math.log(number) if self._is_log else number)

    def draw(self, x: float, *, is_last: bool) -> str:
        """Draw the axis with its name and ticks."""
        if self._names:
            ticks = [(name, self._scale(i)) for i, name in enumerate(self._names)]
        else:
            shares = [i / 4 for i in range(5)]
            places = [self._low + share * (self._high - self._low) for share in shares]
            ticks = [
                (_figure(math.exp(p) if self._is_log else p), self._scale(p))
                for p in (places if self._high > self._low else places[:1])
            ]
        anchor, shift = ("end", -6) if is_last else ("start", 6)
        words = "".join(
            f'<text class="tick" x="{x + shift:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
            for text, y in ticks
        )
        middle = "end" if is_last else "middle" if x > LEFT else "start"
        return (
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="name" x="{x:.1f}" y="{HEIGHT - 14}" text-anchor="{middle}">'
            f"{escape(self.name)}</text>{words}"
        )


def _vertical(values: Sequence[float], name: str) -> tuple[Scale, str]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    axis = _Axis(name, [low, high])
    scale = _linear(low, high, HEIGHT - BOTTOM, TOP)
    lines = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
        f"{_figure(value)}</text>"
        for value in ([low + i / 4 * (high - low) for i in range(5)] if high > low else [low])
        for y in [scale(value)]
    )
    title = f'<text class="name" x="{LEFT - 8}" y="{TOP - 12}">{escape(axis.name)}</text>'
    return scale, lines + title


def _numbers(x: Scale, last: int, name: str) -> str:
    step = max(1, math.ceil(last / 12))
    ticks = "".join(
        f'<text class="tick" x="{x(n):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
        f"{n}</text>"
        for n in range(1, last + 1, step)
    )
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        ticks
        + f'<text class="name" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{name}</text>'
    )


def _line(points: Sequence[tuple[float, float]], trial: Trial, colour: str) -> str:
    return (
        f'<polyline class="trial" data-trial="{trial.number}" stroke="{colour}" '
        f'points="{_points(points)}"><title>{_name(trial)}</title></polyline>'
    )


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _svg(parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    if not high > low:
        return lambda value: (start + end) / 2  # noqa: ARG005 - all values are one
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _goodness(trial: Trial, values: Sequence[float], objective: Objective) -> float:
    """Give a trial's place among all, from 0, the worst, to 1."""
    value = _value(trial, objective.metric)
    if value is None or len(values) < 2:
        return 0.0
    return sum(objective.gain(value, other) > 0 for other in values) / (len(values) - 1)


def _colour(goodness: float) -> str:
    """Give a colour from pale to dark."""
    pale, dark = (203, 214, 226), (16, 78, 139)
    mixed = (round(a + (b - a) * goodness) for a, b in zip(pale, dark, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _value(trial: Trial, metric: str) -> float | None:
    value = trial.metrics.get(metric)
    return value if trial.status in ("finished", "cut") and _is_finite(value) else None


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _name(trial: Trial) -> str:
    return escape(f"trial {trial.number}, {trial.status}: {_words(trial.params)}")


def _words(params: dict[str, Param]) -> str:
    return ", ".join(
        f"{name} {_figure(value) if isinstance(value, float) else value}"
        for name, value in sorted(params.items())
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
