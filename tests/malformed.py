"""Layouts that are wrong in ways that nobody thinks of, and what must hold of their messages."""

import dataclasses
import json
import time
from pathlib import Path

from hypothesis import strategies as st

from lrd_helpers.layout import Layer, Layout, LayoutError


class Json(str):
    """JSON text that stands for itself."""


class Pairs(list):
    """A JSON object as pairs: a field may be there twice."""


NASTY = [
    *("null", "true", "-1", "2", "0.5", "1e-320", "NaN", "-Infinity", "1e999", "9" * 400),
    "9" * 5000,
    *('""', '" "', '"car"', '"red"', r'"\ud800"', r'"\u0000"', r'"\n\u001b[2J"', '"naïve 👩🚀"'),
    *('"data:image/png;base64,AAAA"', '"data:"', '"gone.png"', r'"a\u0000b.png"', r'"\ud800.png"'),
    *(json.dumps("x " * size) for size in (100, 10**5, 5 * 10**5)),
    *("[]", "{}", "[[]]", "[0, 0, 1, 1]", "[1, 1, 0, 0]", "[0.5, 0.5, 0.2, 0.2]", "[12, 4, 90, 5]"),
    *("[" * depth + "]" * depth for depth in (9, 900, 10**5)),
    *('{"a":' * depth + "1" + "}" * depth for depth in (9, 900, 10**5)),
    *("[" + "1e9," * size + "1]" for size in (3, 10**5)),
    *("{" + ",".join(f'"{n % size}": 1' for n in range(30_000)) + "}" for size in (9, 29_999)),
]  # fmt: skip
FIELDS = {
    cls: [field.name for field in dataclasses.fields(cls) if field.name != "layers"]
    for cls in (Layout, Layer)
}
EXAMPLES = sorted(Path(__file__).parents[1].glob("examples/*.json"))


def written(value: object) -> str:
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(k)}: {written(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return value if isinstance(value, Json) else json.dumps(value)


@st.composite
def malformed(draw: st.DrawFn) -> tuple[str, list[str]]:
    """An example with one to three faults, and what a message about a single fault names."""
    text = draw(st.sampled_from(EXAMPLES)).read_text()
    layout: Pairs = json.loads(text, object_pairs_hook=Pairs)
    layers = next(value for name, value in layout if name == "layers")
    named: list[list[str]] = []
    for fault in draw(st.lists(st.sampled_from(["value", "twice", "name"]), max_size=3)):
        number = draw(st.integers(0, len(layers)))
        place = layers[number - 1] if number else layout
        name = draw(st.sampled_from(FIELDS[Layer if number else Layout]))
        if fault == "name":
            del place[draw(st.integers(0, len(place) - 1))]
            name = draw(st.text(max_size=9) | st.just("x" * 10**6))
        elif fault == "value":
            place[:] = [pair for pair in place if pair[0] != name]
        value = draw(st.sampled_from(NASTY) | st.text().map(json.dumps))
        place.append((name, Json(value)))
        named.append([f"layer {number}" if number else "", "" if fault == "name" else name])
    layers *= min(draw(st.sampled_from([1, 1, 1, 0, 10**3])), max(1, 10**5 // len(written(layers))))
    text = written(layout)
    if draw(st.integers(0, 4)) == 0:
        cut = draw(st.integers(0, len(text)))
        named += [[], []]
        text = text[:cut] + draw(st.text(max_size=3)) + text[cut + draw(st.integers(0, 3)) :]
    return text, named[0] if layers and len(named) == 1 else []


def check_malformed(text: str, named: list[str], file: str) -> str:
    """Whatever is wrong is said quickly, in one short sentence that says where; returns it."""
    begun, message = time.process_time(), ""
    try:
        layout = Layout.from_json(text, file=file)
    except LayoutError as error:
        message = str(error)
        assert message.startswith(file)
        assert message.isprintable()
        assert len(message) <= 300
        assert "nested too deeply" in message or all(name in message for name in named)
    seconds = time.process_time() - begun
    assert seconds < 2 * max(1, len(text) / 10**6), seconds
    if not message:
        assert Layout.from_json(layout.to_json()) == layout
    return message
