"""The parts of a page that a command writes, each between two comments."""


def filled(text: str, name: str, part: str) -> str:
    """A page with what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->`` anew."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{part}\n{end}{after}"
