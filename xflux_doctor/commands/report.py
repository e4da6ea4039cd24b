"""`xflux-doctor report RUN`: the whole story of a run folder on one page."""

from __future__ import annotations

from pathlib import Path

import click

from xflux_doctor.errors import UsageError
from xflux_doctor.files import write_atomic
from xflux_doctor.report import jsonreport, story, storyhtml, storytext


def run(folder: str, *, form: str, html: str | None) -> int:
    """Print it, and write the page where one is wanted. Always 0: telling of a failure is no failure."""
    place = Path(folder)
    if not place.is_dir():
        raise UsageError(f"There is no run folder at {folder}.", "Name the output_dir of a run.")
    if html is not None and not Path(html).absolute().parent.is_dir():
        raise UsageError(f"There is no folder {Path(html).parent}.", "Check the path given to --html.")
    told = story.tell(place)
    if html is not None:
        write_atomic(Path(html), storyhtml.page(told))
    click.echo(jsonreport.encode(told) if form == "json" else storytext.render(told), nl=False)
    return 0
