"""A cable between two network namespaces, in user space: packets are carried from one TUN device to the other.

relay.py NAMESPACE0 NAMESPACE1 DROP      `cable0` and `cable1` are made there; while the file DROP exists, all is lost
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import sys
from pathlib import Path

TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000


def end(namespace: str, name: str) -> int:
    """A TUN device in a namespace; the file stays good when this process leaves it."""
    place = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(place, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(place)
    file = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return file


def main() -> None:
    first, second = end(sys.argv[1], "cable0"), end(sys.argv[2], "cable1")
    drop = Path(sys.argv[3])
    print("ready", flush=True)
    while True:
        for source in select.select([first, second], [], [])[0]:
            try:
                packet = os.read(source, 65536)
                if not drop.exists():
                    os.write(second if source == first else first, packet)
            except OSError:  # one end is down
                continue


if __name__ == "__main__":
    main()
