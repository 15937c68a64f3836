"""Write layered_rendering_diffusion.py, one file that `DiffusionPipeline.from_pretrained` loads.

    make community

It is interface.py with all that it uses of the package, directly or not: whole functions and
classes as they stand there, comments and all. Of a class those methods remain whose names are used
somewhere. What interface.py defines itself stands in place of what has the same name in the
package. Shapes are `Annotated[Tensor, "channels height width"]`, which needs no jaxtyping.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import tomllib

FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parents[1]
TARGET = FOLDER / "layered_rendering_diffusion.py"

SECTIONS = {
    "lrd_helpers.methods.lrdiff": "Algorithm 1",
    "lrd_helpers.methods.plain": "its last steps: the prompt alone",
    "lrd_helpers.methods.guidance": "vision guidance: δ and ξ",
    "lrd_helpers.methods.regions": "who is asked what, where, at which step",
    "lrd_helpers.methods.choices": "what the paper leaves open",
    "lrd_helpers.sampling.run": "one drawing: noise, guidance, steps",
    "lrd_helpers.sampling.regions": "what the U-Net is asked in one step, as one batch",
    "lrd_helpers.sampling.steps": "schedulers",
    "lrd_helpers.sampling.predictions": "what a network predicts",
    "lrd_helpers.sampling.model": "pictures and latents",
    "lrd_helpers.attention": "cross-attention",
    "lrd_helpers.layout": "layers and layouts",
    "lrd_helpers.layout_json": "boxes of other conventions",
    "lrd_helpers.mask": "masks",
    "lrd_helpers.naming": "words",
    "lrd_helpers.messages": "what messages show",
    "lrd_helpers.pipeline": "arguments",
    "interface": "the pipeline, and what stands around the algorithm",
}
"""The modules in the order in which they are read, and their headings in the file."""

RENAMED = {
    "LayeredRenderingMixin": "LayeredRenderingDiffusionPipeline",
    "Method": "Choices",
    "AsksForLayers": "Choices",
}
"""Annotations that are something narrower here."""

REWORDED = {
    """in place of a box: an array (height, width), an image, or
            the path of an image file; white (or opaque, in an image that is transparent elsewhere)
            is the object. Of any size, stretched to the canvas. `Mask.of` has all the rules, and
            reads maps of labels.""": """in place of a box: an array (height, width) of
            True, where the object is, and False. Of any size, stretched to the canvas.""",
    """None takes the one that the prompt says of its object (see
            `lrd_helpers.naming.named_by`), and no guidance where it says none.""": """None
            takes that of `colour_of_prompt`, and no guidance where there is none.""",
    """None takes a guess by English grammar ("car"
            of "a red car on grass"; see `lrd_helpers.naming.named_by`). Prompts in other scripts
            need it.""": """None
            takes that of `object_of_layer` ("car" of "a red car on grass").""",
    """`lrd_helpers.layout_json` has a converter for each other convention
            (`box_from_xywh`, `box_from_centre`, …).""": """`box_from_xywh` and `box_from_centre`
            make it of other conventions.""",
    """For methods that are `translucent` (the collage,
            LaRender); the others refuse it.""": "Algorithm 1 refuses it.",
    """fuse: the layers are put together at all "steps" (`lrdiff.layered_denoising`: the paper's
            Algorithm 1); or each runs alone and they are put together "once", after the last
            layered step (`script.merged_once`); or each is sketched alone, and its object is put
            into a "collage" (`collage.collage_of_sketches`, which is no LRDiff). Where all layers
            (of all pictures) fill the canvas there is nothing to move: "collage" is "steps".
        sketch_steps: with fuse="collage": in how many steps of DDIM a layer is sketched.
""": """fuse: the layers are put together at all "steps": the paper's Algorithm 1, and all that
            there is here. `lrd_helpers` has two more.
        sketch_steps: of one of those.
""",
    """(the paper's t0). With
            fuse="collage" these steps are not made: the sketches take their place.""": """(the
            paper's t0).""",
    "; see `capture_attention`.": ".",
}
"""What docstrings say of the package, and what is true here."""

HEADER = '''
"""Layered Rendering Diffusion (LRDiff) for diffusers: boxes or masks → picture, no training.

Generated from `lrd_helpers` {version} ({address})
by its examples/community/generate.py: change it there. That package also has nine other methods
that obey boxes (the best is a collage, which is no LRDiff), Stable Diffusion XL, and a course.

    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        custom_pipeline="layered_rendering_diffusion.py",  # the path of this file
        trust_remote_code=True,
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe(
        "a red car and a yellow star at night",
        [("a red car", (0.05, 0.55, 0.50, 0.95)), ("a yellow star", (0.60, 0.05, 0.95, 0.40))],
        background="at night",
        generator=torch.Generator().manual_seed(0),
    ).images[0]

Algorithm 1 is `layered_denoising`, right below the imports. Its guidance ξ is `vision_guidance`, δ
is `constant_delta`, `contrast_delta` or `dynamic_delta`; what the paper leaves open is `Choices`.
The pipeline is the last part.

Licence: MIT. Please cite the paper, whose authors have no part in this file:

    @inproceedings{{qi2024lrdiff,
      title     = {{Layered Rendering Diffusion Model for Controllable Zero-Shot Image Synthesis}},
      author    = {{Qi, Zipeng and Huang, Guoxi and Liu, Chenyang and Ye, Fei}},
      booktitle = {{European Conference on Computer Vision (ECCV)}},
      year      = {{2024}},
      note      = {{arXiv:2311.18435}}
    }}
"""

from __future__ import annotations
'''.lstrip()

# ------------------------------------------------------------------ reading the sources


@dataclass(eq=False)
class Definition:
    """A function, a class or a constant of a module.

    Attributes:
        module: where it stands.
        node: of the syntax tree.
        lines: of its file.
        first: its first line, from 1; decorators and comments right above belong to it.
        last: its last line; a constant's docstring belongs to it.
        methods: of a class, by their names.
        kept: the names of those that remain.
    """

    module: str
    node: ast.stmt
    lines: list[str]
    first: int
    last: int
    methods: dict[str, ast.FunctionDef] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)

    @property
    def names(self) -> list[str]:
        """What it is called; an assignment may have several names."""
        if isinstance(self.node, (ast.FunctionDef, ast.ClassDef)):
            return [self.node.name]
        targets = self.node.targets if isinstance(self.node, ast.Assign) else [self.node.target]
        return [each.id for t in targets for each in ast.walk(t) if isinstance(each, ast.Name)]

    @property
    def text(self) -> str:
        """Its source, without the methods that do not remain."""
        dropped: set[int] = set()
        for name in self.methods.keys() - self.kept:
            method = self.methods[name]
            dropped |= set(range(_first_line(method, self.lines), method.end_lineno + 1))
        numbers = range(self.first, self.last + 1)
        return "\n".join(self.lines[n - 1] for n in numbers if n not in dropped)

    def nodes(self) -> Iterator[ast.AST]:
        """The parts of it that remain."""
        if not isinstance(self.node, ast.ClassDef):
            yield self.node
            return
        yield from [*self.node.bases, *self.node.decorator_list]
        for node in self.node.body:
            if not isinstance(node, ast.FunctionDef) or node.name in self.kept:
                yield node


@dataclass
class Module:
    """What a module defines and imports, by the names there.

    Attributes:
        definitions: name → definition.
        imports: name → (module, what of it), None for the module itself.
    """

    definitions: dict[str, Definition]
    imports: dict[str, tuple[str, str | None]]


@cache
def read(name: str) -> Module:
    """A module of the package, or a file of this folder."""
    path = (REPOSITORY if name.startswith("lrd_helpers") else FOLDER) / name.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = file.read_text(encoding="utf-8")
    module, lines = Module({}, {}), text.splitlines()
    nodes = list(_statements(ast.parse(text).body))
    for node, after in zip(nodes, [*nodes[1:], None], strict=True):
        if isinstance(node, ast.ImportFrom):
            module.imports |= {a.asname or a.name: (node.module, a.name) for a in node.names}
        elif isinstance(node, ast.Import):
            module.imports |= {a.asname or a.name: (a.name, None) for a in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)):
            has_docstring = isinstance(node, (ast.Assign, ast.AnnAssign)) and _is_text(after)
            last = (after if has_docstring else node).end_lineno
            definition = Definition(name, node, lines, _first_line(node, lines), last)
            if isinstance(node, ast.ClassDef):
                methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
                definition.methods |= {method.name: method for method in methods}
            module.definitions |= dict.fromkeys(definition.names, definition)
    return module


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Also those below `with quiet_libraries():` and `if TYPE_CHECKING:`."""
    for node in body:
        if isinstance(node, (ast.If, ast.With)):
            yield from _statements(node.body)
        else:
            yield node


def _is_text(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _first_line(node: ast.stmt, lines: list[str]) -> int:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    while re.match(" " * node.col_offset + "# (?!---)", lines[first - 2]):
        first -= 1
    return first


# ------------------------------------------------------------------ what is used


def closure(root: str) -> tuple[list[Definition], set[str]]:
    """All definitions that a module uses, directly or not, and the lines of its imports."""
    used = list(dict.fromkeys(read(root).definitions.values()))
    imports: set[str] = set()
    attributes: set[str] = set()  # every name after a dot
    size = None
    while size != (size := (len(used), len(attributes))):
        for definition in used:  # it grows
            definition.kept |= {
                name
                for name in definition.methods
                if definition.module == root
                or name in attributes
                or name.startswith("__")
                or is_another_librarys(definition, root)
            }
            for node in definition.nodes():
                names, after_dots = mentioned(node)
                attributes |= after_dots
                for name in names:
                    found = resolved(name, definition.module, root)
                    if isinstance(found, str):
                        imports.add(found)
                    elif found is not None and found not in used:
                        used.append(found)
    return used, imports


def is_another_librarys(definition: Definition, root: str) -> bool:
    """Whether a class is derived from one of another library, which may call any of its methods."""
    names = set().union(*(mentioned(base)[0] for base in definition.node.bases))
    return any(isinstance(resolved(name, definition.module, root), str) for name in names)


@cache
def mentioned(node: ast.AST) -> tuple[set[str], set[str]]:
    """The names that stand alone in a part of a program, and those after a dot."""
    names, attributes = set(), set()
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            names.add(RENAMED.get(each.id, each.id))
        elif isinstance(each, ast.Attribute):
            attributes.add(each.attr)
    return names, attributes


def resolved(name: str, module: str, root: str) -> Definition | str | None:
    """What a name in a module is: a definition, the line that imports it, or None."""
    for definitions in (read(root).definitions, read(module).definitions):
        if name in definitions:
            return definitions[name]
    if name not in read(module).imports:
        return None  # built in, or local
    source, what = read(module).imports[name]
    if source.startswith("lrd_helpers"):
        return resolved(what, source, root)
    if source == "jaxtyping":
        return None
    if what is None:
        return f"import {source}" + (f" as {name}" if name != source else "")
    return f"from {source} import {what}" + (f" as {name}" if name != what else "")


# ------------------------------------------------------------------ the file


def in_order(used: list[Definition], root: str) -> list[Definition]:
    """As `SECTIONS` has them; but what a definition needs while it is read stands before it."""
    sections = list(SECTIONS)
    ordered: list[Definition] = []
    begun: set[Definition] = set()

    def put(definition: Definition) -> None:
        if definition in begun:
            return
        begun.add(definition)
        for name in needed_at_once(definition.node):
            found = resolved(name, definition.module, root)
            if isinstance(found, Definition):
                put(found)
        ordered.append(definition)

    for each in sorted(used, key=lambda d: (sections.index(d.module), d.first)):
        put(each)
    return ordered


def needed_at_once(node: ast.AST) -> set[str]:
    """The names that must have a value when a definition is read, and not only when it runs."""
    if isinstance(node, ast.FunctionDef):
        parts = [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
    elif isinstance(node, ast.ClassDef):
        parts = [*node.bases, *node.decorator_list, *node.body]
    else:
        return mentioned(node.value)[0] if node.value is not None else set()
    names: set[str] = set()
    for part in parts:
        inner = isinstance(part, (ast.FunctionDef, ast.Assign, ast.AnnAssign))
        names |= needed_at_once(part) if inner else mentioned(part)[0]
    return names


def generated() -> str:
    """The text of the file.

    Raises:
        ValueError: two definitions of one name, or a module that `SECTIONS` does not have.
    """
    used, imports = closure("interface")
    places: dict[str, str] = {}
    for definition in used:
        if definition.module not in SECTIONS:
            raise ValueError(f"{definition.names[0]} is of {definition.module}, not in SECTIONS")
        for name in definition.names:
            if name in places:
                raise ValueError(f"{name} is in {places[name]} and in {definition.module}")
            places[name] = definition.module
    with open(REPOSITORY / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    parts = [HEADER.format(version=project["version"], address=project["urls"]["Repository"])]
    parts += [*sorted(imports), "from typing import Annotated"]
    section = None
    for definition in in_order(used, "interface"):
        if SECTIONS[definition.module] != section:
            section = SECTIONS[definition.module]
            parts.append(f"\n\n# {'-' * (97 - len(section))} {section}\n")
        parts.append(f"\n{definition.text}\n")
    return tidied(plain("\n".join(parts)))


def plain(text: str) -> str:
    """Without jaxtyping, and with what annotations and docstrings say here.

    Raises:
        ValueError: a docstring of `REWORDED` is not there, or twice.
    """
    for old, new in REWORDED.items():
        if text.count(old) != 1:
            raise ValueError(f"REWORDED: {text.count(old)} × {old[:60]!r}…")
        text = text.replace(old, new)
    text = re.sub(r"\b(?:Bool|Float|Int|Shaped)\[(?=Tensor)", "Annotated[", text)
    for name, new in RENAMED.items():
        text = re.sub(rf"(?<=: ){name}\b", new, text)
    return text


def tidied(text: str) -> str:
    """Imports sorted, and only those that are used; in the form of the rest of the repository."""
    ruff = [sys.executable, "-m", "ruff"]
    rest = ["--quiet", "--stdin-filename", str(TARGET), "-"]
    for command in (["check", "--fix-only", "--select", "I,F401"], ["format"]):
        text = subprocess.run(
            [*ruff, *command, *rest], input=text, capture_output=True, text=True, check=True
        ).stdout
    return text


if __name__ == "__main__":
    TARGET.write_text(generated(), encoding="utf-8")
    print(f"written: {TARGET.relative_to(REPOSITORY)}")
