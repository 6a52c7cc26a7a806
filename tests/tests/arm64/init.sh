#!/bin/sh
# Process 1 of the arm64 machine: runs kube-lane out of the files of its image, serves a Service from a folder, and says
# of each scenario on the second serial port whether it ended well. All programs but kube-lane are busybox's.
export PATH=/bin:/sbin:/usr/local/bin

mkdir -p /proc /sys /dev /tmp /run /manifests /www
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
# kubelet makes it.
mkdir /sys/fs/cgroup/kubepods

node=192.168.7.1
service=10.96.0.10
pod=10.244.0.2
client=10.244.1.2

# Makes a host of its own, attached to the node: its name, its address, the node's address towards it.
add_host() {
    # shellcheck disable=SC2016
    unshare -n sh -c 'echo $$ >"/run/$0" && exec sleep 100000' "$1" &
    until [ -s "/run/$1" ]; do usleep 100000; done
    # busybox cannot name the other end. It goes away at once, so the next one has the same name.
    ip link add "to-$1" type veth
    ip link set veth0 netns "$(cat "/run/$1")"
    ip address add "$3/24" dev "to-$1"
    ip link set "to-$1" up
    on "$1" ip link set lo up
    on "$1" ip address add "$2/24" dev veth0
    on "$1" ip link set veth0 up
    on "$1" ip route add default via "$3"
}

# Runs a program on such a host.
on() {
    of=$1
    shift
    nsenter -t "$(cat "/run/$of")" -n "$@"
}

# Tries a command for a minute and more: emulation is slow.
try() {
    for _ in $(seq 100); do
        "$@" && return 0
        usleep 500000
    done
    echo "never: $*"
    return 1
}

answers() {
    where=$1
    shift
    [ "$("$@" timeout 3 wget -q -O - "http://$where/name")" = pod ]
}

start_agent() {
    kube-lane --manifests /manifests --hostname-override node --cluster-cidr 10.244.0.0/16 --proxy-mode "$1" &
    agent=$!
    try synced
}

synced() {
    wget -q -O /dev/null http://127.0.0.1:10256/healthz
}

stop_agent() {
    kill "$agent"
    wait "$agent"
    kube-lane cleanup
}

# What each of the clients reaches at the Service's addresses.
is_served() {
    try answers "$service" && try answers "$node:30080" &&
        try answers "$service" on client && try answers "$node:30080" on client
}

the_image_is_for_this_machine() {
    kube-lane version
    kube-lane version | grep linux/arm64
}

check_finds_both_modes_to_work() {
    kube-lane check --proxy-mode ebpf
}

services_are_served_in_mode_nftables() {
    start_agent nftables && is_served && stop_agent && ! answers "$service"
}

services_are_served_in_mode_ebpf() {
    start_agent ebpf && is_served && is_led_at_the_socket && stop_agent && ! answers "$service"
}

# A connection to the Service is one to the pod for the kernel, which says so in hexadecimal digits.
is_led_at_the_socket() {
    sleep 30 | nc "$service" 80 &
    try grep '0200F40A:1F90 01' /proc/net/tcp
}

scenario() {
    echo "=== scenario $1"
    if "$1"; then outcome=ok; else outcome=FAILED; fi
    echo "scenario $1 $outcome" >/dev/ttyS0
}

echo 1 >/proc/sys/net/ipv4/ip_forward
ip link set lo up
ip address add "$node/32" dev lo
add_host pod "$pod" 10.244.0.1
add_host client "$client" 10.244.1.1
# Who dials a Service has a route to it, whichever it is.
ip route add default via "$client"
echo pod >/www/name
on pod httpd -p 8080 -h /www

scenario the_image_is_for_this_machine
scenario check_finds_both_modes_to_work
scenario services_are_served_in_mode_nftables
scenario services_are_served_in_mode_ebpf
poweroff -f
