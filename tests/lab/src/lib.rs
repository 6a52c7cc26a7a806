//! Nodes, pods and outside hosts in network namespaces.
