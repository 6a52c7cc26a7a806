//! The kernel lane: what the kernel does with what we program, in network namespaces. Needs root.

// Named test modules for clippy, which else forbids `unwrap` in the helpers.
#[cfg(test)]
mod affinity;
#[cfg(test)]
mod bare;
#[cfg(test)]
mod cases;
#[cfg(test)]
mod check;
#[cfg(test)]
mod conntrack;
#[cfg(test)]
mod counters;
#[cfg(test)]
mod families;
#[cfg(test)]
mod following;
#[cfg(test)]
mod foreign;
#[cfg(test)]
mod health;
#[cfg(test)]
mod history;
#[cfg(test)]
mod lab;
#[cfg(test)]
mod nftables;
#[cfg(test)]
mod object;
#[cfg(test)]
mod plans;
#[cfg(test)]
mod policies;
#[cfg(test)]
mod probe;
mod read_back;
#[cfg(test)]
mod services;
#[cfg(test)]
mod socket_clients;
#[cfg(test)]
mod socket_leftovers;
#[cfg(test)]
mod socket_life;
#[cfg(test)]
mod socket_maps;
#[cfg(test)]
mod socket_node_addresses;
#[cfg(test)]
mod socket_places;
#[cfg(test)]
mod socket_pods;
#[cfg(test)]
mod socket_ports;
#[cfg(test)]
mod socket_programs;
#[cfg(test)]
mod socket_repair;
#[cfg(test)]
mod socket_upgrade;
#[cfg(test)]
mod status;
#[cfg(test)]
mod systemd;
#[cfg(test)]
mod world;
