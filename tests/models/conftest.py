"""Collect what families of models can do, and print it as tables when they were asked for."""

_TABLES: dict[str, list[tuple[str, ...]]] = {"families": [], "verdicts": []}
_HEADS = {
    "families": ("family", "terms", "difference to eager", "refused"),
    "verdicts": ("model type", "task", "what terms may read", "reason"),
}


def tell(table: str, *cells: str) -> None:
    """Add a line to a table."""
    _TABLES[table].append(cells)


def pytest_terminal_summary(terminalreporter, config):
    if "families" not in (config.getoption("-m") or "").replace("not families", ""):
        return
    for name, lines in _TABLES.items():
        if lines:
            terminalreporter.write_line("")
            for cells in (_HEADS[name], ("---",) * len(_HEADS[name]), *lines):
                terminalreporter.write_line("| " + " | ".join(cells) + " |")
