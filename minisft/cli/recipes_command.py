"""`minisft recipes`: the recipes that come with the package, and the text of one."""

from argparse import Namespace

from minisft.config_io import nearest, shipped_recipes
from minisft.errors import UserError, printable


def run(options: Namespace) -> None:
    """Print what each recipe is for, as its first line says, or the recipe that is named."""
    texts = {name: file.read_text(encoding="utf-8") for name, file in shipped_recipes().items()}
    if options.name:
        if options.name not in texts:
            raise UserError(f"{printable(options.name)}: not a shipped recipe{nearest(options.name, texts)}; they are "
                            f"{', '.join(texts)}")
        print(texts[options.name], end="")
        return
    for name, text in texts.items():
        print(f"{name:<{max(map(len, texts))}}  {text.partition(chr(10))[0].removeprefix('# ')}")
    print("\n`minisft recipes NAME > my.toml` copies one, for you to change; `minisft train NAME` runs it as it is.")
