#!/bin/sh
# Makes sure that MariaDB's server is installed, from the system's packages.
# Nothing to do: exit 0. Not allowed to install: exit 1 and say how.
set -eu

# A user's PATH often leaves out the directories for system programs.
PATH=$PATH:/usr/local/bin:/usr/bin:/usr/sbin:/usr/local/sbin:/sbin
export PATH

is_there() {
    command -v mariadbd >/dev/null && command -v mariadb-install-db >/dev/null
}

if is_there; then
    exit 0
fi

give_up() {
    echo "MariaDB is not installed. $1" >&2
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
    sudo apt-get update && sudo apt-get install --no-install-recommends -y mariadb-server"
fi

echo "Installing MariaDB from the system's packages."
# RUNLEVEL=1 keeps the package from starting its service: the tests start servers
# of their own, in temporary folders and on ports of their own.
quietly="$as_root env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive"
$quietly apt-get update || give_up "The list of packages could not be fetched."
# Newer systems have the programs without the service in a package of their own.
package=mariadb-server
if apt-cache show mariadb-server-core >/dev/null 2>&1; then
    package="mariadb-server-core mariadb-client-core"
fi
# Unquoted: these may be two packages.
# shellcheck disable=SC2086
if ! $quietly apt-get install --no-install-recommends -y $package; then
    give_up "Its installation failed; see the messages above."
fi
if [ -d /run/systemd/system ] && [ "$package" = mariadb-server ]; then
    $as_root systemctl disable --now mariadb ||
        echo "The service mariadb could not be switched off; it may be running." >&2
fi
is_there || give_up "Its package left no programs called mariadbd and mariadb-install-db."
