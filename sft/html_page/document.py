"""A page as one file: style and script are in it, and it may ask for nothing else."""

import base64
import hashlib
from html import escape
from pathlib import Path

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
)
"""Content Security Policy (https://www.w3.org/TR/CSP3): no request leaves, and no script but the page's own runs."""


def document(title: str, body: str, beside: str) -> str:
    """A whole HTML page in the common style.

    Args:
        title: plain text.
        body: the content of <main>, as markup.
        beside: a file of the package; the page.css and page.js next to it come on top of the common style.
    """
    common = Path(__file__).with_name("base.css").read_text(encoding="utf-8")
    style, script = (Path(beside).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    script = f"\n{script}"
    policy = POLICY.format(digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>\n{common}{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def minus(text: str) -> str:
    """A figure as markup, with the minus sign of its typeface instead of a hyphen."""
    return escape(text).replace("-", "−")
