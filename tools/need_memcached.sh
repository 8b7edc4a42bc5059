#!/bin/sh
# Makes sure that memcached is installed, from the system's packages.
# Nothing to do: exit 0. Not allowed to install: exit 1 and say how.
set -eu

# A user's PATH often leaves out the directories for system programs.
PATH=$PATH:/usr/local/bin:/usr/bin:/usr/sbin:/usr/local/sbin:/sbin
export PATH

if command -v memcached >/dev/null; then
    exit 0
fi

give_up() {
    echo "memcached is not installed. $1" >&2
    exit 1
}

if ! command -v apt-get >/dev/null; then
    give_up "Install it with your system's package manager, then try again."
elif [ "$(id -u)" -eq 0 ]; then
    as_root=
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    give_up "Installing it needs a password; run this, then try again:
    sudo apt-get update && sudo apt-get install --no-install-recommends -y memcached"
fi

echo "Installing memcached from the system's packages."
# RUNLEVEL=1 keeps the package from starting its service: the tests and the
# demo start servers of their own, on ports of their own.
quietly="$as_root env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive"
if ! $quietly apt-get update ||
    ! $quietly apt-get install --no-install-recommends -y memcached; then
    give_up "Its installation failed; see the messages above."
fi
if [ -d /run/systemd/system ]; then
    $as_root systemctl disable --now memcached ||
        echo "The service memcached could not be switched off; it may be running." >&2
fi
command -v memcached >/dev/null || give_up "Its package left no program called memcached."
