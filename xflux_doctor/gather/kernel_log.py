"""The driver's error reports (Xid) in the kernel log, where this user may read it.

A record of /dev/kmsg is `level,number,microseconds,flags;text` (kernel Documentation/ABI/testing/dev-kmsg); lines of
an Xid are `NVRM: Xid (PCI:0000:3b:00): 79, pid=…` (https://docs.nvidia.com/deploy/xid-errors/).
"""

from __future__ import annotations

import datetime
import os
import re
import time
from pathlib import Path

from xflux_doctor.facts import Xid

_XID = re.compile(r"NVRM: (Xid \(PCI:([\w:.]+)\): (\d+).*)")
_SXID = re.compile(r"(SXid \(PCI:([\w:.]+)\): (\d+), Fatal.*)")
"""A report of the NVSwitch; only fatal ones count."""
_RECORD = re.compile(r"\d+,\d+,(\d+),[^;]*;(.*)")
_SYSLOG = re.compile(r"([A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d|\d{4}-\d\d-\d\dT\S+)\s")
_MOST_BYTES = 4 << 20
_MOST_SECONDS = 0.06
_TAIL = 256 << 10
_MOST = 64
_LONGEST = 160


def xids(
    root: Path = Path("/"), uptime: float | None = None, now: datetime.datetime | None = None
) -> tuple[Xid, ...] | None:
    """The newest reports since the machine started, oldest first; None: the log is not readable from here.

    `uptime` in seconds and `now` in local time are the clocks to hold the log against. /proc/uptime is not asked:
    some containers show their own there.
    """
    uptime = time.clock_gettime(time.CLOCK_MONOTONIC) if uptime is None else uptime
    text, whole = _kmsg(root / "dev/kmsg")
    if text is not None:
        found = [xid for line in text.splitlines() if (xid := _of_record(line, uptime))]
        return tuple(found[-_MOST:]) if found or (whole and text) else None
    tail = _tail(root / "var/log/kern.log")
    if tail is None:
        return None
    clock = now or datetime.datetime.now().astimezone()
    dated = [xid for line in tail.splitlines() if (xid := _of_line(line, clock))]
    return tuple(xid for xid in dated if xid.seconds <= uptime)[-_MOST:]


def _kmsg(path: Path) -> tuple[str | None, bool]:
    """The log's text, and whether its end was reached within the bounds of bytes and time."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None, False
    parts: list[bytes] = []
    size, limit = 0, time.perf_counter() + _MOST_SECONDS
    whole = False
    try:
        while size < _MOST_BYTES and time.perf_counter() < limit:
            try:
                part = os.read(handle, 8192)  # one record of the device
            except BlockingIOError:
                whole = True
                break
            except BrokenPipeError:  # the record was overwritten while it was read: go on with the next
                continue
            if not part:
                whole = True
                break
            parts.append(part)
            size += len(part)
    except OSError:
        return None, False  # opened and not readable: kernel.dmesg_restrict, or a container's dummy
    finally:
        os.close(handle)
    return b"".join(parts).decode("utf-8", "replace"), whole


def _tail(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            return file.read(_TAIL).decode("utf-8", "replace")
    except OSError:
        return None


def _of_record(line: str, uptime: float) -> Xid | None:
    record = _RECORD.match(line)
    return _report(record[2], uptime - int(record[1]) / 1e6) if record else None


def _of_line(line: str, now: datetime.datetime) -> Xid | None:
    if "Xid (" not in line:
        return None
    stamp = _SYSLOG.match(line)
    try:
        seconds = (now - _time(stamp[1], now)).total_seconds() if stamp else None
    except ValueError:
        return None
    return None if seconds is None else _report(line, seconds)


def _time(stamp: str, now: datetime.datetime) -> datetime.datetime:
    """The old form has no year: it is this one, or the last where the day would lie ahead."""
    if stamp[0].isdigit():
        return datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00")).astimezone(now.tzinfo)
    when = datetime.datetime.strptime(f"{now.year} {stamp}", "%Y %b %d %H:%M:%S").replace(tzinfo=now.tzinfo)
    return when.replace(year=now.year - 1) if when > now + datetime.timedelta(days=1) else when


def _report(line: str, seconds: float) -> Xid | None:
    match = _XID.search(line) or _SXID.search(line)
    return Xid(int(match[3]), match[2], max(0.0, seconds), match[1][:_LONGEST]) if match else None
