#!/bin/sh
# Makes sure that PostgreSQL's server is installed, from the system's packages.
# Nothing to do: exit 0. Not allowed to install: exit 1 and say how.
set -eu

# A user's PATH often leaves out the directories for system programs.
PATH=$PATH:/usr/local/bin:/usr/bin:/usr/sbin:/usr/local/sbin:/sbin
export PATH

# Debian keeps the programs of each version in a directory of their own.
is_there() {
    for program in /usr/lib/postgresql/*/bin/initdb; do
        if [ -x "$program" ] && [ -x "${program%initdb}postgres" ]; then
            return 0
        fi
    done
    command -v initdb >/dev/null && command -v postgres >/dev/null
}

if is_there; then
    exit 0
fi

give_up() {
    echo "PostgreSQL is not installed. $1" >&2
    exit 1
}

if ! command -v apt-get >/dev/null; then
    give_up "Install its server with your system's package manager, then try again."
elif [ "$(id -u)" -eq 0 ]; then
    as_root=
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    give_up "Installing it needs a password; run this, then try again:
    sudo apt-get update && sudo apt-get install --no-install-recommends -y postgresql"
fi

echo "Installing PostgreSQL from the system's packages."
# RUNLEVEL=1 keeps the package from starting its service: the tests start servers
# of their own, in temporary folders and on ports of their own.
quietly="$as_root env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive"
if ! $quietly apt-get update ||
    ! $quietly apt-get install --no-install-recommends -y postgresql; then
    give_up "Its installation failed; see the messages above."
fi
if [ -d /run/systemd/system ]; then
    # The second stops the server of each version that the package set up.
    if ! $as_root systemctl disable --now postgresql ||
        ! $as_root systemctl stop 'postgresql@*'; then
        echo "The service postgresql could not be switched off; it may be running." >&2
    fi
fi
is_there || give_up "Its package left no programs called initdb and postgres."
