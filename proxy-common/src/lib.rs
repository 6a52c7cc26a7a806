//! Types that both the agent and the eBPF programs read: layouts only, no behaviour of either side.
#![no_std]
