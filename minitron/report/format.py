"""Numbers as people read them, the same in the terminal and on the page."""


def count(number: float) -> str:
    """A count with three or four significant digits: ``134.5M``."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.2f}{unit}" if scaled < 10 else f"{scaled:.1f}{unit}"
    return f"{number:.0f}"


def nats(loss: float) -> str:
    """A loss in nats per token."""
    return f"{loss:.3f}"


def perplexity(value: float) -> str:
    """A perplexity, which spans orders of magnitude before retraining."""
    if value < 1000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 1e6 else power(value)


def share(value: float | None) -> str:
    """A share in percent, or a dash."""
    if value is None:
        return "-"
    percent = 100 * value
    if abs(percent) < 1000:
        return f"{percent:.1f} %"
    return f"{percent:,.0f} %" if abs(percent) < 1e5 else f"{power(percent)} %"


def power(value: float) -> str:
    """A large number in powers of ten: ``1.23e15``."""
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{digits}e{int(exponent)}"


def duration(seconds: float) -> str:
    """A wall time: ``12.3 s``, ``3 min 05 s``, ``1 h 02 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float) -> str:
    """A file size in units of 10^3 bytes: ``269 MB``."""
    for unit_size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit_size:
            scaled = num_bytes / unit_size
            return f"{scaled:.0f} {unit}" if scaled >= 100 else f"{scaled:.1f} {unit}"
    return f"{num_bytes:.0f} B"
