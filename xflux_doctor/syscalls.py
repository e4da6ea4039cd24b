"""Names of the system calls that processes wait in, by the machine's numbers, and which of them are about a file.

Source: Linux 6.12, arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h (aarch64).
"""

from __future__ import annotations

import functools
import os

_X86_64 = """
read 0 write 1 open 2 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 munmap 11 ioctl 16 pread64 17 pwrite64 18
readv 19 writev 20 access 21 select 23 sched_yield 24 msync 26 madvise 28 pause 34 nanosleep 35 sendfile 40 connect 42
accept 43 sendto 44 recvfrom 45 sendmsg 46 recvmsg 47 wait4 61 semop 65 msgrcv 70 fcntl 72 flock 73 fsync 74
fdatasync 75 truncate 76 ftruncate 77 chdir 80 rename 82 mkdir 83 rmdir 84 creat 85 link 86 unlink 87 readlink 89
chmod 90 chown 92 statfs 137 fstatfs 138 sync 162 getxattr 191 futex 202 io_getevents 208 getdents64 217
semtimedop 220 fadvise64 221 clock_nanosleep 230 exit_group 231 epoll_wait 232 utimes 235 mq_timedreceive 243
waitid 247 openat 257 mkdirat 258 newfstatat 262 unlinkat 263 renameat 264 readlinkat 267 faccessat 269 pselect6 270
ppoll 271 sync_file_range 277 splice 275 epoll_pwait 281 fallocate 285 accept4 288 preadv 295 pwritev 296 recvmmsg 299
syncfs 306 renameat2 316 copy_file_range 326 preadv2 327 pwritev2 328 statx 332 io_uring_enter 426 openat2 437
faccessat2 439 epoll_pwait2 441 futex_waitv 449 futex_wait 455
"""
_AARCH64 = """
io_getevents 4 getxattr 8 epoll_pwait 22 fcntl 25 ioctl 29 flock 32 mkdirat 34 unlinkat 35 renameat 38 statfs 43
fstatfs 44 truncate 45 ftruncate 46 fallocate 47 faccessat 48 chdir 49 openat 56 close 57 getdents64 61 lseek 62
read 63 write 64 readv 65 writev 66 pread64 67 pwrite64 68 preadv 69 pwritev 70 sendfile 71 pselect6 72 ppoll 73
splice 76 readlinkat 78 newfstatat 79 fstat 80 sync 81 fsync 82 fdatasync 83 sync_file_range 84 exit_group 94
waitid 95 futex 98 nanosleep 101 clock_nanosleep 115 sched_yield 124 mq_timedreceive 183 msgrcv 188 semtimedop 192
semop 193 accept 202 connect 203 sendto 206 recvfrom 207 sendmsg 211 recvmsg 212 munmap 215 mmap 222 fadvise64 223
msync 227 madvise 233 accept4 242 recvmmsg 243 wait4 260 syncfs 267 renameat2 276 copy_file_range 285 preadv2 286
pwritev2 287 statx 291 io_uring_enter 426 openat2 437 faccessat2 439 epoll_pwait2 441 futex_waitv 449 futex_wait 455
"""
BY_FD = frozenset(
    "read write pread64 pwrite64 readv writev preadv pwritev preadv2 pwritev2 close fstat lseek ioctl fcntl flock "
    "fsync fdatasync ftruncate fallocate fstatfs getdents64 syncfs sync_file_range fadvise64 sendfile copy_file_range "
    "splice connect accept accept4 sendto recvfrom sendmsg recvmsg recvmmsg".split()
)
"""Their first argument is a descriptor."""
BY_PATH = frozenset(
    "open stat lstat access truncate chdir rename mkdir rmdir creat link unlink readlink chmod chown statfs getxattr "
    "utimes".split()
)
"""Their first argument is the address of a path."""
BY_FOLDER = frozenset(
    "openat openat2 mkdirat newfstatat unlinkat renameat renameat2 readlinkat faccessat faccessat2 statx".split()
)
"""Their first argument is a folder's descriptor, or AT_FDCWD, their second the address of a path."""
AT_FDCWD = -100


def name(number: int) -> str:
    """`syscall 999` for one that is not known, or on a machine of another kind."""
    return _names().get(number, f"syscall {number}")


@functools.cache
def _names() -> dict[int, str]:
    words = {"x86_64": _X86_64, "aarch64": _AARCH64}.get(os.uname().machine, "").split()
    return {int(number): name for name, number in zip(words[::2], words[1::2], strict=True)}
