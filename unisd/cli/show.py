"""`unisd show`: the views of a prepared row, side by side: what the student, the teacher and the others read.

    unisd show prepared --row 3
    unisd show prepared --row 3 --html row.html

The page is one file and reads well on a phone. What differs from the student's prompt is marked.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from unisd.cli.errors import CommandError, setting_up
from unisd.cli.parser import CommandParser, natural
from unisd.prepare.folder import is_prepared, load_prepared
from unisd.show.page import page
from unisd.show.terminal import side_by_side
from unisd.show.views import views_to_show
from unisd_kernels.files import replacing


def main(arguments: list[str]) -> int:
    parser = CommandParser(prog="unisd show", description=__doc__)
    parser.add_argument("folder", type=Path, help="what unisd prepare wrote")
    parser.add_argument("--row", type=natural, default=0, help="number of the row, from 0")
    parser.add_argument("--html", type=Path, help="write the page there (default: FOLDER/row-N.html)")
    parser.add_argument("--model", help="count the tokens of each view with this model's tokenizer")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with --model")
    parser.add_argument("--width", type=natural, help="columns of the terminal")
    options = parser.parse_args(arguments)
    if not is_prepared(options.folder):
        raise CommandError(f"{options.folder} holds no prepared rows: unisd prepare FILE -o {options.folder}")
    with setting_up():
        rows = load_prepared(options.folder)
        if options.row >= len(rows):
            raise CommandError(f"--row {options.row}: {options.folder} has the rows 0 to {len(rows) - 1}")
        count = None
        if options.model is not None:
            from unisd.models import resolve_model
            from unisd.text_tokenizer import load_tokenizer
            from unisd.turns import as_prompt, encode_prompt

            tokenizer = load_tokenizer(resolve_model(options.model), trust_remote_code=options.trust_remote_code)
            chats = tokenizer.chat_template is not None

            def count(text: str) -> int:
                return len(encode_prompt(tokenizer, as_prompt(text, chats)))

        views = views_to_show(rows[options.row], count)
    width = options.width or shutil.get_terminal_size((100, 24)).columns
    file = options.html or options.folder / f"row-{options.row}.html"
    # Before anything is printed: whoever reads may stop at the first lines (`| head`).
    with replacing(file) as new:
        new.write_text(page(views, f"Row {options.row} of {options.folder.name}"), encoding="utf-8")
    print(side_by_side(views, width))
    print(f"\nas a page: {file}")
    return 0
