"""From the list of a decoder's parts to its figure, asked of the built model."""

from collections.abc import Iterator

from scripts.docs_site.figure import Arrow, Drawn, svg
from scripts.docs_site.measured import MeasuredModel
from scripts.docs_site.model_figures import FIGURES, Box, Step

COLUMNS = 4


def draw(name: str) -> str:
    """The figure of a decoder as SVG."""
    return Drawing(name).svg()


class Drawing:
    """The figure of one decoder and the model that it was asked of."""

    def __init__(self, name: str) -> None:
        self.name, self.figure = name, FIGURES[name]
        self.model = MeasuredModel(self.figure.experiment)

    def svg(self) -> str:
        described = f"Data flow of {self.name} on {self.model.config.backbone}, from the image to the tasks"
        return svg([*self._above(), *self._decoder(), *self._heads(), *self._notes()], [*self._arrows()], COLUMNS,
                   described)

    def covered(self) -> float:
        """Share of the decoder's parameters that the boxes name."""
        paths = {step.path for box in self.figure.boxes for step in box.steps if isinstance(step, Step)}
        return self.model.parameters(paths) / self.model.parameters(["decoder"])

    def _above(self) -> Iterator[Drawn]:
        """Image, backbone and maps."""
        height, width = self.model.config.input_size
        yield Drawn("image", 0, 0, "", [f"image: 3 channels, {height} x {width}"], "image", COLUMNS)
        neck = "" if self.model.config.neck == "none" else f", neck {self.model.config.neck}"
        yield Drawn("backbone", 1, 0, f"backbone {self.model.config.backbone}{neck}",
                    [_millions(self.model.parameters(["encoder", "neck"]))], "backbone", COLUMNS)
        for index, (channels, rows, columns) in enumerate(self.model.maps()):
            unread = index in self.figure.unread
            lines = [self._size({"c": channels, "h": rows, "w": columns}),
                     "nothing is made of it" if unread else self.figure.maps_note]
            yield Drawn(f"map{index}", 2, index, f"map {index + 1}", [*filter(None, lines)], "map", dashed=unread)

    def _decoder(self) -> Iterator[Drawn]:
        for box in self.figure.boxes:
            for index, task in enumerate(self.model.tasks if box.every_task else [""]):
                name = f"{box.name}{index}" if box.every_task else box.name
                title = box.title.replace("{task}", task)
                yield Drawn(name, box.row, box.column + index, title, self._lines(box, task), box.colour, box.span)

    def _lines(self, box: Box, task: str) -> list[str]:
        def here(path: str) -> str:
            return path.replace("{task}", task or self.model.tasks[0])
        steps = [step for step in box.steps if isinstance(step, Step)]
        lines = ["- " + (f"{step.words} {self.model.kind(here(step.path))}".strip() if isinstance(step, Step) else step)
                 for step in box.steps]
        if box.shape is not None:
            path, axes = box.shape
            entering = path.startswith("<")
            number = int(path[1]) if entering and path[1].isdigit() else 0
            sizes = self.model.map_of(here(path.lstrip("<0123456789")), axes, number if entering else None)
            lines.append(f"{box.of}{self._size(sizes)}")
        paths = [here(step.path) if box.every_task else step.path for step in steps]
        return lines + ([_millions(self.model.parameters(paths))] if paths else [])

    def _heads(self) -> Iterator[Drawn]:
        if not self.figure.heads_from:
            return
        row = max(box.row for box in self.figure.boxes) + 1
        for index, task in enumerate(self.model.tasks):
            path = f"heads.{task}"
            yield Drawn(f"head{index}", row, index, task, [
                f"head: {self.model.kind(path)}", self._size(self.model.map_of(path, "b c h w")),
                _millions(self.model.parameters([path]))], "head")

    def _notes(self) -> Iterator[Drawn]:
        for number, (row, column, span, lines) in enumerate(self.figure.notes):
            yield Drawn(f"note{number}", row, column, "", lines, "note", span)

    def _arrows(self) -> Iterator[Arrow]:
        yield Arrow("image", "backbone")
        for index in range(len(self.model.maps())):
            yield Arrow("backbone", f"map{index}")
        for arrow in self.figure.arrows:
            yield arrow if isinstance(arrow, Arrow) else Arrow(*arrow)
        every = {box.name for box in self.figure.boxes if box.every_task}
        for start in self.figure.heads_from:
            for index in range(len(self.model.tasks)):
                yield Arrow(f"{start}{index}" if start in every else start, f"head{index}")

    def _size(self, sizes: dict[str, int]) -> str:
        """A map in words: channels, grid, and the stride where it is a whole one."""
        stride = self.model.config.input_size[0] / sizes["h"]
        share = f" (1/{stride:g})" if stride > 1 and stride == int(stride) else ""
        return f"{sizes['c']} ch, {sizes['h']} x {sizes['w']}{share}"


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f} M parameters" if number >= 1e4 else f"{number:,} parameters"
