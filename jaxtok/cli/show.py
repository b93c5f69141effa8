"""`jaxtok show`: kept, merged and dropped tokens drawn on a picture."""

import dataclasses
import json
import pathlib
from typing import Annotated

import tyro

from jaxtok.cli.common import Common, console


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show(Common):
    """Draw what methods make of the tokens of a picture: a PNG for each place at which one acts."""

    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """A picture's file."""
    method: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Such as tome, divprune, fastv:query=all, evit:places=1+3,keep=50%; of the sites vit, select and layers, given several times they
    compose. Fields that are left open follow from the model's sizes and --keep."""
    model: str = "embedded_vlm"
    """A Hugging Face directory or hub id of a LLaVA, or of an image encoder (sites vit and select), or `embedded_vlm`, the small model of the
    package, which reads handwritten digits."""
    keep: str = "25%"
    """Image rows that are left in the end: a number, or a share of the patches."""
    question: str | None = None
    """What the model is asked about the picture; methods that look at the text choose by it."""
    out: str = "jaxtok-show"
    """Folder for the pictures."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        import PIL.Image

        from jaxtok.core.registry import parse_budget
        from jaxtok.evals import onlookers, pictures, stages

        if not self.method:
            raise ValueError("show needs --method NAME, once or several times; `jaxtok list` has the names")
        try:
            with PIL.Image.open(self.image) as file:
                picture = file.convert("RGBA" if "A" in file.getbands() else "RGB")
        except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as e:  # Pillow's for a broken file
            raise ValueError(f"{self.image} is no picture that can be read: {e}") from None
        model = onlookers.of(self.model)
        sizes = stages.Sizes.of(model.cfg)
        recipe = stages.recipe_of(self.method, sizes, stages.rows_of(parse_budget(self.keep), sizes.patches))
        if model.ask is None and self.question is not None:
            raise ValueError(f"{self.model} is an encoder, which is asked nothing; leave --question out")
        pixels, drawn = model.look(picture)
        found = stages.stages(model.cfg, model.params, pixels, None if model.ask is None else model.ask(self.question), recipe)
        out = pathlib.Path(self.out)
        out.mkdir(parents=True, exist_ok=True)
        entries = []
        for i, stage in enumerate(found, 1):
            path = out / f"{i}_{stage.site}{stage.place if stage.site != 'select' else ''}_{stage.method}.png"
            pictures.save(drawn, stage, i, len(found), path)
            entries.append({"file": str(path), "site": stage.site, "method": stage.method, "where": stage.where, **stage.counts})
        if self.json:
            print(json.dumps(entries, indent=1))
            return
        screen = console()
        if model.note:
            screen.print(f"note: {model.note}", markup=False)
        for entry, stage in zip(entries, found, strict=True):
            screen.print(f"{entry['file']}: {stage.method}, {stage.where}: {pictures.told(stage)}", markup=False, soft_wrap=True)
