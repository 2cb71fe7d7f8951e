"""One style sheet out of many, with the rules that some page can use. Used by `book_pages`."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from urllib.parse import urlsplit

import tinycss2
from fontTools import subset

WORD = re.compile(r"[A-Za-z_][\w-]*")


def resolved(sheet: Path, to: Path, seen: set[Path]) -> list:
    """The rules of a sheet and of those it imports, with addresses relative to the folder `to`."""
    if sheet in seen:
        return []
    seen.add(sheet)
    rules = []
    for rule in tinycss2.parse_stylesheet(sheet.read_text(encoding="utf-8"), skip_comments=True, skip_whitespace=True):
        if rule.type == "error":
            raise ValueError(f"{sheet.name}, line {rule.source_line}: {rule.message}")
        if rule.type == "at-rule" and rule.lower_at_keyword == "charset":
            continue
        if rule.type == "at-rule" and rule.lower_at_keyword == "import":
            target = next(token.value for token in rule.prelude if token.type in ("string", "url"))
            rules += resolved((sheet.parent / target).resolve(), to, seen)
            continue
        for token in walk(rule.content or []):
            if token.type == "url":
                token.value = moved(token.value, sheet, to)
                token.representation = f'url("{token.value}")'
            elif token.type == "function" and token.lower_name == "url":
                text = token.arguments[0]
                text.value = moved(text.value, sheet, to)
                text.representation = f'"{text.value}"'
        rules.append(rule)
    return rules


def walk(tokens):
    """All tokens, those in brackets too."""
    for token in tokens:
        yield token
        yield from walk(getattr(token, "content", None) or getattr(token, "arguments", None) or [])


def moved(address: str, sheet: Path, to: Path) -> str:
    """An address of a sheet, as seen from the folder `to`."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc or not parts.path:
        return address
    target = (sheet.parent / parts.path).resolve()
    # What follows "?" only tells versions apart, and a name with it is another name for files.
    return target.relative_to(to).as_posix()


def split(tokens) -> list[list]:
    """Selectors between commas."""
    selectors: list[list] = [[]]
    for token in tokens:
        if token == ",":
            selectors.append([])
        else:
            selectors[-1].append(token)
    return selectors


def possible(selector, words: set[str], keep: tuple[str, ...]) -> bool:
    """Whether every class and id that a selector asks for occurs; what stands in brackets may be a negation."""
    for before, token in zip([None, *selector], selector, strict=False):
        asked = (token.type == "ident" and before == ".") or token.type == "hash"
        if asked and token.value not in words and not token.value.startswith(keep):
            return False
    return True


def write(rules, words: set[str], keep: tuple[str, ...]) -> list[str]:
    """The text of the rules that can apply."""
    lines = []
    for rule in rules:
        if rule.type == "qualified-rule":
            chosen = [part for part in split(rule.prelude) if possible(part, words, keep)]
            if chosen and (body := tight(tinycss2.serialize(rule.content))):
                lines.append(",".join(tinycss2.serialize(part).strip() for part in chosen) + "{" + body + "}")
        elif rule.type == "at-rule":
            head = f"@{rule.at_keyword}{tinycss2.serialize(rule.prelude).rstrip()}"
            if rule.lower_at_keyword in ("media", "supports", "layer", "container") and rule.content is not None:
                inner = tinycss2.parse_blocks_contents(rule.content, skip_comments=True, skip_whitespace=True)
                if body := "\n".join(write(inner, words, keep)):
                    lines.append(f"{head}{{\n{body}\n}}")
            elif rule.content is None:
                lines.append(head + ";")
            else:
                lines.append(head + "{" + tight(tinycss2.serialize(rule.content)) + "}")
    return lines


def tight(text: str) -> str:
    """Declarations without comments and line breaks."""
    return re.sub(r"\s+", " ", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)).strip()


def bundle(sheets: list[Path], to: Path, pages: list[str], scripts: list[str], keep: tuple[str, ...]) -> str:
    """One sheet, to stand in the folder `to`; a class or id counts as used if its name stands in a page or script."""
    words: set[str] = set()
    for page in pages:
        for value in re.findall(r'\b(?:class|id)="([^"]*)"', page):
            words.update(value.split())
        for script in re.findall(r"<script\b[^>]*>(.*?)</script>", page, re.DOTALL):
            words.update(WORD.findall(script))
    for script in scripts:
        words.update(WORD.findall(script))
    seen: set[Path] = set()
    rules = [rule for sheet in sheets for rule in resolved(sheet, to, seen)]
    return "\n".join(write(rules, words, keep)) + "\n"


def subset_icons(css: str, static: Path) -> str:
    """The theme's icon fonts with no other characters than those that the sheet draws; a face with none is dropped."""
    logging.getLogger("fontTools.subset").setLevel(logging.WARNING)
    drawn = {int(code, 16) for code in re.findall(r"\\(f[0-9a-f]{3})\b", css)}
    drawn |= {ord(letter) for letter in re.findall("[\ue000-\uf8ff]", css)}

    def face(found):
        source = re.search(r'url\("?([^")]*/fa-[a-z]+-\d+)\.ttf"?\)', found[0])
        if source is None:
            return found[0]
        target = static / (source[1] + ".woff")
        options = subset.Options(
            flavor="woff", layout_features=[], desubroutinize=True, name_IDs=[], notdef_outline=False
        )
        font = subset.load_font(str(static / (source[1] + ".ttf")), options)
        wanted = drawn & set(font.getBestCmap())
        if not wanted:
            return ""
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=wanted)
        subsetter.subset(font)
        subset.save_font(font, str(target), options)
        return re.sub(r"src:[^;}]*", f'src:url("{source[1]}.woff") format("woff")', found[0])

    return re.sub(r"@font-face\s*\{[^}]*\}", face, css)
