"""What Windows lacks is taken away from this process, so that code which needs it fails here, too."""

import os
import select
import signal
import socket
import sys
import time

# Modules of the standard library, and functions and constants, as the documentation of Python lists them; without those
# that the library itself needs here.
MODULES = """
_curses crypt curses fcntl grp nis ossaudiodev pty pwd readline resource spwd syslog termios tty
"""
OS = """
O_ACCMODE O_ASYNC O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC O_EXLOCK O_LARGEFILE O_NDELAY O_NOATIME O_NOCTTY O_NOFOLLOW
O_NONBLOCK O_PATH O_RSYNC O_SHLOCK O_SYNC O_TMPFILE WCOREDUMP WEXITSTATUS WIFEXITED WIFSIGNALED chown chroot confstr
copy_file_range ctermid environb eventfd fchdir fchmod fchown fdatasync fork forkpty fpathconf fstatvfs get_blocking
getegid getenvb geteuid getgid getgrouplist getgroups getloadavg getpgid getpgrp getpriority getresgid getresuid
getsid getuid getxattr initgroups killpg lchown listxattr lockf major makedev memfd_create minor mkfifo mknod nice
openpty pathconf pidfd_open pipe2 posix_fadvise posix_fallocate posix_spawn posix_spawnp pread preadv pwrite pwritev
readv register_at_fork removexattr sched_get_priority_max sched_getaffinity sched_getparam sched_getscheduler
sched_setaffinity sched_yield sendfile set_blocking setegid seteuid setgid setgroups setpgid setpriority setregid
setresgid setresuid setreuid setsid setuid setxattr splice statvfs sync sysconf tcgetpgrp tcsetpgrp ttyname uname
wait wait3 wait4 waitid writev
"""
OTHERS = {
    select: "epoll poll",
    signal: "SIGALRM SIGHUP SIGKILL SIGQUIT SIGUSR1 alarm pthread_kill setitimer",
    socket: "AF_UNIX",
    time: "clock_gettime tzset",
}


def take_away_modules():
    """No POSIX-only module can be imported any more."""
    sys.modules.update(dict.fromkeys(MODULES.split()))


def take_away_functions():
    """No function or constant that only POSIX has is there any more."""
    for module, names in {os: OS, **OTHERS}.items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
