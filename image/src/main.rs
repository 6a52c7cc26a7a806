//! Writes the container image of kube-lane: an OCI archive, or its files in a folder. `cargo xtask image` builds the agent,
//! unpacks Debian's packages and calls it. Compiles nothing, fetches nothing and pushes nothing.
#![expect(clippy::print_stdout, reason = "a command-line tool speaks on its standard streams")]

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Parser;
use jiff::Timestamp;
use kube_lane_image::{Arch, Image};

mod contents;

/// Bytes of an archive, at most: every node of a cluster fetches the image.
const MAX_SIZE: usize = 25_000_000;

const REPOSITORY: &str = "ghcr.io/kube-lane/kube-lane";

/// The licences of the agent and of the Debian packages that the image holds, as an SPDX expression.
const LICENSES: &str = "Apache-2.0 AND GPL-2.0-or-later AND GPL-3.0-or-later WITH GCC-exception-3.1 AND \
                        LGPL-2.1-or-later AND MPL-2.0";

/// Write the container image of kube-lane.
#[derive(Parser)]
struct Args {
    /// The architecture of the agent
    #[arg(long, value_enum)]
    arch: Arch,
    /// The agent
    #[arg(long, value_name = "FILE")]
    agent: PathBuf,
    /// The licence of the agent
    #[arg(long, value_name = "FILE")]
    license: PathBuf,
    /// Where Debian's packages are unpacked
    #[arg(long, value_name = "DIR")]
    system: PathBuf,
    /// A package whose files the image holds, and so its licence; may be given several times
    #[arg(long = "package", value_name = "NAME")]
    packages: Vec<String>,
    /// The commit
    #[arg(long, value_name = "COMMIT")]
    revision: String,
    /// When it was made, in seconds since 1970
    #[arg(long, value_name = "SECONDS")]
    created: u64,
    /// Where the archive goes
    #[arg(long, value_name = "FILE", conflicts_with = "rootfs", required_unless_present = "rootfs")]
    archive: Option<PathBuf>,
    /// Where the files go instead
    #[arg(long, value_name = "DIR")]
    rootfs: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let image = image(&args)?;
    if let Some(folder) = &args.rootfs {
        return image.write_files(folder);
    }
    let Some(to) = &args.archive else { return Ok(()) };
    let written = image.write(to)?;
    ensure!(written.size < MAX_SIZE, "{} has {} bytes; {MAX_SIZE} are allowed", to.display(), written.size);
    let megabytes = written.size as f64 / 1e6;
    println!("{} for linux/{}: {megabytes:.1} MB, {}", image.name(), args.arch.as_str(), written.digest);
    Ok(())
}

/// What the image holds and says.
fn image(args: &Args) -> Result<Image> {
    let version = env!("CARGO_PKG_VERSION");
    let mut image = Image::new(&format!("{REPOSITORY}:{version}"), args.arch)?;
    image.created = args.created;
    image.entrypoint = vec![contents::AGENT.to_owned()];
    image.env = vec!["PATH=/usr/local/bin".to_owned()];
    let labels = [
        ("title", "kube-lane".to_owned()),
        ("description", "A kube-proxy replacement: Services as nftables and eBPF map elements".to_owned()),
        ("version", version.to_owned()),
        ("revision", args.revision.clone()),
        ("source", env!("CARGO_PKG_REPOSITORY").to_owned()),
        ("licenses", LICENSES.to_owned()),
        ("created", Timestamp::from_second(i64::try_from(args.created)?)?.to_string()),
    ];
    image.labels = labels.map(|(name, value)| (format!("org.opencontainers.image.{name}"), value)).into();
    contents::add(args, &mut image)?;
    Ok(image)
}
