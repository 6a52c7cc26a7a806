//! Puts the eBPF object into the agent where `KUBE_LANE_BPF_OBJECT` names one, as `cargo xtask build` does. Nothing
//! else is looked at: without the variable the agent is built without eBPF, on any machine with stable Rust.

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=KUBE_LANE_BPF_OBJECT");
    println!("cargo::rustc-check-cfg=cfg(bpf_object)");
    let Some(object) = std::env::var_os("KUBE_LANE_BPF_OBJECT").filter(|object| !object.is_empty()) else {
        return;
    };
    match Path::new(&object).canonicalize().ok().as_deref().and_then(Path::to_str) {
        Some(object) => {
            println!("cargo::rerun-if-changed={object}");
            println!("cargo::rustc-env=KUBE_LANE_BPF_OBJECT_PATH={object}");
            println!("cargo::rustc-cfg=bpf_object");
        }
        None => println!("cargo::error=KUBE_LANE_BPF_OBJECT names no file: {}", object.display()),
    }
}
