"""A text report of the stock."""


def report(store, low=10):
    lines = []
    for name, count in store.all():
        mark = " (low)" if count < low else ""
        lines.append(f"{name}: {count}{mark}")
    return "\n".join(lines[:-1])
