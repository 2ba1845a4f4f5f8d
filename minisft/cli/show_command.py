"""`minisft show`: documents as the model sees them, on the terminal or as a page."""

from argparse import Namespace

from minisft import config_io, prepare
from minisft.errors import PATH, printable
from minisft.reports.data_report import unread_fields
from minisft.reports.page import check_outputs, write
from minisft.reports.token_view import as_page, choose, print_views


def run(options: Namespace) -> None:
    """Show the chosen documents, and warn about fields that nothing reads."""
    config = config_io.load(options.recipe)
    check_outputs({"--html": options.html}, prepare.inputs(config, options.recipe))
    prepared = prepare.prepare(config)
    views = choose(prepared, source=options.source, index=options.index, longest=options.longest,
                   random=options.random, pack=options.pack, step=options.step, whole=bool(options.html))
    if options.html:
        write(options.html, as_page(views))
        print(printable(options.html, PATH), *(view.heading for view in views), sep="\n  ")
    else:
        print_views(views, ids=options.ids)
    for line in unread_fields(prepared):
        print("warning:", line)
