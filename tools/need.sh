#!/bin/sh
# need.sh memcached|postgresql|mariadb
# Makes sure that a server is installed, from the system's packages.
# Nothing to do: exit 0. Not allowed to install: exit 1 and say how.
set -eu

# A user's PATH often leaves out the directories for system programs.
PATH=$PATH:/usr/local/bin:/usr/bin:/usr/sbin:/usr/local/sbin:/sbin
export PATH

server=$1
service=$1
case $server in
memcached)
    package=memcached
    programs=memcached
    ;;
postgresql)
    package=postgresql
    programs="initdb and postgres"
    ;;
mariadb)
    package=mariadb-server
    programs="mariadbd and mariadb-install-db"
    # Newer systems have the programs without the service in a package of their own.
    core="mariadb-server-core mariadb-client-core"
    ;;
*)
    echo "need.sh does not know $server." >&2
    exit 1
    ;;
esac

is_there() {
    case $server in
    memcached)
        command -v memcached >/dev/null
        ;;
    postgresql)
        # Debian keeps the programs of each version in a directory of their own.
        for program in /usr/lib/postgresql/*/bin/initdb; do
            if [ -x "$program" ] && [ -x "${program%initdb}postgres" ]; then
                return 0
            fi
        done
        command -v initdb >/dev/null && command -v postgres >/dev/null
        ;;
    mariadb)
        command -v mariadbd >/dev/null && command -v mariadb-install-db >/dev/null
        ;;
    esac
}

give_up() {
    echo "$server is not installed. $1" >&2
    exit 1
}

if is_there; then
    exit 0
fi

if ! command -v apt-get >/dev/null; then
    give_up "Install it with your system's package manager, then try again."
elif [ "$(id -u)" -eq 0 ]; then
    as_root=
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    give_up "Installing it needs a password; run this, then try again:
    sudo apt-get update && sudo apt-get install --no-install-recommends -y $package"
fi

echo "Installing $server from the system's packages."
# RUNLEVEL=1 keeps the package from starting its service: the tests and the demo
# start servers of their own, on ports of their own.
quietly="$as_root env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive"
$quietly apt-get update || give_up "The list of packages could not be fetched."
if [ -n "${core:-}" ] && apt-cache show ${core%% *} >/dev/null 2>&1; then
    package=$core
    service=
fi
# Unquoted: these may be two packages.
# shellcheck disable=SC2086
$quietly apt-get install --no-install-recommends -y $package ||
    give_up "Its installation failed; see the messages above."
if [ -n "$service" ] && [ -d /run/systemd/system ]; then
    $as_root systemctl disable --now "$service" ||
        echo "The service $service could not be switched off; it may be running." >&2
    # PostgreSQL's package sets up a service for each version.
    [ "$server" != postgresql ] || $as_root systemctl stop 'postgresql@*' || true
fi
is_there || give_up "Its package left no $programs."
