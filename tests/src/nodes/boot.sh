#!/bin/sh
# Process 1 of a node: gives it file systems of its own, in namespaces that are new already. `$1` is the folder that is
# the node's disk, `$2` its name. Everything that the node changes of the machine's tree goes to that disk, or ends with
# the node.
set -eu
disk=$1
mount --make-rshared /
mount -t proc proc /proc
hostname "$2"

for dir in etc lib log; do
    mkdir -p "$disk/$dir" "$disk/$dir.work"
done
mount -t overlay -o "lowerdir=/etc,upperdir=$disk/etc,workdir=$disk/etc.work" overlay /etc
mount -t overlay -o "lowerdir=/var/lib,upperdir=$disk/lib,workdir=$disk/lib.work" overlay /var/lib
mount -t overlay -o "lowerdir=/var/log,upperdir=$disk/log,workdir=$disk/log.work" overlay /var/log
# An overlay cannot lie on another one, and kubelet measures its disk.
for dir in containerd kubelet; do
    mkdir -p "$disk/$dir" "/var/lib/$dir"
    mount --bind "$disk/$dir" "/var/lib/$dir"
done
mount -t tmpfs -o mode=755 run /run
mount -t bpf bpf /sys/fs/bpf

# kubelet sets these for the whole machine: it gets files in their place.
for sysctl in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys \
    kernel/keys/root_maxbytes; do
    own=/run/sysctl-$(echo "$sysctl" | tr / -)
    cat "/proc/sys/$sysctl" > "$own"
    mount --bind "$own" "/proc/sys/$sysctl"
done

touch "$disk/booted"
# Processes whose parents have ended become children of this one: `wait` takes them away.
while :; do
    sleep 1 &
    wait
done
