//! The eBPF object that `cargo xtask build` puts into the agent.

use std::path::Path;
use std::{env, fs};

/// Its BTF names the line of a source for each instruction: by the same path, wherever it was built.
#[test]
fn the_object_names_no_folder_of_this_machine() {
    let object = env::var_os("KUBE_LANE_BPF_OBJECT").expect("run this through `cargo xtask test`");
    let object = fs::read(object).unwrap();
    let names = |path: &[u8]| object.windows(path.len()).any(|bytes| bytes == path);
    assert!(names(b"/kube-lane/proxy-ebpf/src/main.rs"), "no lines of sources");
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned();
    let homes = ["CARGO_HOME", "RUSTUP_HOME", "HOME"].into_iter().filter_map(env::var_os).map(Into::into);
    // A home may be `/`, which all paths name.
    for folder in homes.chain([repository]).filter(|folder| folder.parent().is_some()) {
        let at = format!("{}/", folder.display());
        assert!(!names(at.as_bytes()), "the object names {at}");
    }
}
