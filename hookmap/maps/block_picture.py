"""One kind of block as an SVG: the stream as a line, branches above and below it, every point where it is.

Pure: map in, text out. The stream runs from left to right; a branch leaves it, passes its norms, and is added back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.etree import ElementTree as Xml

from hookmap.maps.document import ArchitectureMap
from hookmap.maps.templates import BlockKind

_STYLE = (
    "text{font:15px system-ui,sans-serif;fill:#1f2933}.point{font-weight:600;fill:#0b5cad}"
    ".path{font:13px ui-monospace,monospace;fill:#616e7c}.stream{stroke:#0b5cad;stroke-width:5}"
    ".wire{stroke:#52606d;stroke-width:1.6;fill:none}.box{fill:#f5f7fa;stroke:#52606d;stroke-width:1.4}"
    ".norm{fill:#fdf3d8;stroke:#b7791f;stroke-width:1.4}.dot{fill:#0b5cad}.sum{fill:#fff;stroke:#0b5cad;stroke-width:2.4}"
)
_SPAN, _BEGIN, _END, _RISE, _TOP = 330, 140, 130, 100, 110


def block_svg(architecture_map: ArchitectureMap, *kinds: BlockKind) -> str:
    """An SVG document of one kind of block of a map, or of several that `describe.alike` puts together."""
    return _Drawing(architecture_map, kinds[0], kinds).draw()


@dataclass
class _Drawing:
    map: ArchitectureMap
    kind: BlockKind
    """the first of `kinds`, which stands for all of them"""
    kinds: tuple[BlockKind, ...]
    parts: list[Xml.Element] = field(default_factory=list)

    def draw(self) -> str:
        roles = [role for role in ("mixer", "cross_attn", "mlp") if getattr(self.kind, role) is not None]
        parallel = self.kind.branch_order == "parallel"
        columns = 1 if parallel else max(1, len(roles))
        norm_on_stream = any("norm(" in relation for relation in self.kind.relations)
        pitch = _SPAN + (170 if norm_on_stream else 80)
        width = _BEGIN + columns * pitch + _END
        self.line = _TOP + _RISE
        sums = max(len(point.terms) for name, point in self.kind.points.items() if name.startswith("resid"))
        height = self.line + 45 + 16 * sums + (36 if norm_on_stream else 0) + (_RISE + 10 if parallel else 0)
        self._element("line", x1=40, y1=self.line, x2=width - 40, y2=self.line, cls="stream")
        layers = f"{sum(len(kind.layers) for kind in self.kinds)} of {self.map.num_layers} layers"
        layers += f" · runs {self.kind.calls} times" if self.kind.calls > 1 else ""
        self._text(40, 28, f"{self.map.architecture} · {self.kind.block_class} · {self.kind.name} · {layers}", "")
        self._stream_point("resid_pre", 60)
        for number, role in enumerate(roles):
            start = _BEGIN + (0 if parallel else number * pitch)
            self._branch(role, start, below=parallel and role == "mlp")
            if not parallel:
                self._after_sum(start, number, number == len(roles) - 1, norm_on_stream)
        self._stream_point("resid_post", width - _END + 20)
        return self._document(width, height)

    def _branch(self, role: str, start: int, below: bool) -> None:
        """Up from the stream, through pre-norm, mixer or MLP, and what follows it, and back to the sum."""
        level = self.line + (_RISE if below else -_RISE)
        end = start + _SPAN
        self._element("path", d=f"M{start},{self.line} V{level} H{end} V{self.line}", cls="wire")
        branch = getattr(self.kind, role)
        boxes = []
        if self._has_pre_norm(role):
            boxes.append(("norm", "norm"))
        named = {"mlp": f"{branch.type} MLP", "cross_attn": "cross-attention"}
        core = (named.get(role, branch.type), "box")
        boxes.append(core)
        if (after := self._after(role)) is not None:
            boxes.append((after, "norm" if after == "norm" else "box"))
        place = start + 22
        for label, cls in boxes:
            size = 120 if (label, cls) == core else 62
            self._element("rect", x=place, y=level - 19, width=size, height=38, rx=7, cls=cls)
            self._text(place + size / 2, level + 5, label, "", "middle")
            if (label, cls) == core:
                self._branch_point(f"{role}_in", place - 6, level, place - 26, level + (40 if below else -50))
            place += size + 26
        self._branch_point(f"{role}_out", end, level, end - 14, level + (-42 if below else 42), "end")
        self._element("circle", cx=end, cy=self.line, r=12, cls="sum")
        self._text(end, self.line + 5, "+", "", "middle")

    def _after_sum(self, start: int, number: int, last: bool, normed: bool) -> None:
        end = start + _SPAN
        if normed:
            self._element("rect", x=end + 34, y=self.line - 17, width=56, height=34, rx=7, cls="norm")
            self._text(end + 62, self.line + 5, "norm", "", "middle")
        if not last and self.kind.branch_order == "sequential":
            if normed and not number:
                self._stream_point("resid_mid_sum", end + 22, drop=66)
            self._stream_point(f"resid_mid.{number}" if number else "resid_mid", end + (105 if normed else 40))

    def _has_pre_norm(self, role: str) -> bool:
        """The branch reads something else than the stream itself."""
        middle = "resid_mid.1" if role == "mlp" and self.kind.cross_attn is not None else "resid_mid"
        stream = ("resid_pre",) if role == "mixer" or self.kind.branch_order != "sequential" else (middle,)
        reads = self.kind.points.get(f"{role}_in")
        return (
            self.kind.norm_placement in ("pre", "sandwich")
            and reads is not None
            and all(reads.terms != self.kind.points[name].terms for name in stream if name in self.kind.points)
        )

    def _after(self, role: str) -> str | None:
        """What is between the bare module and the sum: a norm, or a constant."""
        raw, out = (self.kind.points.get(f"{role}_{name}") for name in ("out_raw", "out"))
        if raw is None or out is None or raw.terms == out.terms:
            return None
        if any(term.weight for term in out.terms):
            return "× weight"
        factor = self._factor(f"{role}_out", 0)
        return f"× {factor}" if factor else "norm"

    def _factor(self, name: str, term: int) -> str:
        """The constant of a point's term; nothing where it is 1, `c` where it differs from layer to layer."""
        scales = {kind.points[name].terms[term].scale for kind in self.kinds}
        return "c" if len(scales) > 1 else "" if scales == {1.0} else f"{scales.pop():g}"

    def _stream_point(self, name: str, x: float, drop: int = 30) -> None:
        if name not in self.kind.points:
            return
        self._element("circle", cx=x, cy=self.line, r=6, cls="dot")
        self._label(name, x - 20, self.line + drop)

    def _branch_point(
        self, name: str, x: float, y: float, label_x: float, label_y: float, anchor: str = "start"
    ) -> None:
        if name in self.kind.points:
            self._element("circle", cx=x, cy=y, r=5, cls="dot")
            self._label(name, label_x, label_y, anchor)

    def _label(self, name: str, x: float, y: float, anchor: str = "start") -> None:
        self._text(x, y, name, "point", anchor)
        for number, term in enumerate(self.kind.points[name].terms):
            path = term.module.removeprefix(self.map.layers_path).lstrip(".") or "block"
            scale = f"{factor}·" if (factor := self._factor(name, number)) else ""
            sign = "+ " if number else ""
            self._text(x, y + 17 + 16 * number, f"{sign}{scale}{path}.{term.side}", "path", anchor)

    def _text(self, x: float, y: float, text: str, cls: str, anchor: str = "start") -> None:
        element = self._element("text", x=x, y=y, cls=cls, **{"text-anchor": anchor})
        element.text = text

    def _element(self, tag: str, cls: str = "", **attributes: object) -> Xml.Element:
        element = Xml.Element(tag, {name: str(value) for name, value in attributes.items()})
        if cls:
            element.set("class", cls)
        self.parts.append(element)
        return element

    def _document(self, width: float, height: float) -> str:
        size = {"width": str(width), "height": str(height), "viewBox": f"0 0 {width} {height}"}
        root = Xml.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size})
        Xml.SubElement(root, "style").text = _STYLE
        Xml.SubElement(root, "rect", {"width": "100%", "height": "100%", "fill": "#fff"})
        root.extend(self.parts)
        return Xml.tostring(root, encoding="unicode") + "\n"
