//! The mark of the socket layer: while the layer may be attached, an empty table beside ours. Its comment names the folder
//! of the pins, in a way that every mount namespace understands. An agent that does without the layer, and cannot see the
//! pins, learns of them there.
//!
//! Owns the table `ip kube-lane-socket`. Never decides when it comes or goes. It is no part of the ruleset: that may be
//! replaced while the mark stays.

use std::ffi::{CStr, c_void};
use std::fmt::{self, Display, Formatter};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use mnl::mnl_sys::{mnl_attr_put, mnl_attr_put_strz};
use nftnl::nftnl_sys::{self as sys, libc};
use nftnl::{MsgType, NlMsg};

use super::NftablesError;
use super::failure::{Owner, fatal};
use super::message::{comment, protocol_family};
use super::netlink::{Netlink, TABLE_NAME, TABLE_USERDATA};
use super::observe::again;
use crate::dataplane::bpf_path::BpfPath;
use crate::model::input::Family;

const NAME: &CStr = c"kube-lane-socket";
/// The most that `nft -f` takes as a comment, in bytes.
const MOST: usize = 127;

/// Begins a comment that names a folder of a BPF file system.
const FOLDER: &str = "bpf ";

/// What a mark says of the folder of the pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mark {
    /// The folder, whoever reads this.
    Folder(BpfPath),
    /// Its path in the mount namespace of the agent that pinned there: an agent of before, or no BPF file system was
    /// mounted there any more.
    Path(PathBuf),
    /// Nothing: its name is longer than a comment, or the comment is somebody else's.
    Untold,
}

/// The place of the mark in the current network namespace.
pub struct Marks {
    netlink: Netlink,
    /// What was put last, and the device number of the folder then.
    own: Option<(u64, Mark)>,
}

impl Marks {
    /// Opens it.
    ///
    /// # Errors
    /// [`NftablesError::Socket`].
    pub fn open() -> Result<Self, NftablesError> {
        Ok(Self { netlink: Netlink::open(false)?, own: None })
    }

    /// The mark, where there is one.
    ///
    /// # Errors
    /// [`NftablesError::ReadBack`].
    pub fn read(&mut self) -> Result<Option<Mark>, NftablesError> {
        let userdata = again(|| self.netlink.table(NAME, Family::V4)).map_err(NftablesError::ReadBack)?;
        Ok(userdata.map(|userdata| Mark::of(&userdata)))
    }

    /// Says that a layer may be attached that is pinned there, and of no other.
    ///
    /// # Errors
    /// [`NftablesError::Ruleset`].
    pub fn put(&mut self, bpf_root: &Path) -> Result<(), NftablesError> {
        let mark = self.mark_of(bpf_root);
        if self.read()?.is_none_or(|found| found != mark.as_read()) {
            self.replace(Some(&mark))?;
        }
        Ok(())
    }

    /// The mark of a folder. This is asked each second: mounts are listed only where another file system is there.
    fn mark_of(&mut self, bpf_root: &Path) -> Mark {
        let device = fs::metadata(bpf_root).ok().map(|folder| folder.dev());
        if let Some((of, mark)) = &self.own
            && device.is_none_or(|device| device == *of)
        {
            return mark.clone();
        }
        let new = Mark::of_folder(bpf_root);
        match (&self.own, device, &new) {
            // What is there now hides the folder, or is in its place: nothing is pinned there.
            (Some((_, mark)), _, Mark::Path(_)) => return mark.clone(),
            (_, Some(device), _) => self.own = Some((device, new.clone())),
            _ => {}
        }
        new
    }

    /// Says that none is attached.
    ///
    /// # Errors
    /// [`NftablesError::Ruleset`].
    pub fn remove(&mut self) -> Result<(), NftablesError> {
        self.replace(None)
    }

    fn replace(&mut self, by: Option<&Mark>) -> Result<(), NftablesError> {
        let mut transaction = self.netlink.begin::<Owner>();
        // A table that exists keeps its comment. Adding it first makes the removal succeed also where there is none.
        transaction.object(&Table(None), MsgType::Add, Owner::Ruleset);
        transaction.object(&Table(None), MsgType::Del, Owner::Ruleset);
        if let Some(mark) = by {
            transaction.object(&Table(mark.text().as_deref()), MsgType::Add, Owner::Ruleset);
        }
        let result = self.netlink.commit(&mut transaction);
        result.map(drop).map_err(|error| fatal(error, NftablesError::Ruleset))
    }
}

impl Mark {
    /// Of the folder at a path.
    fn of_folder(bpf_root: &Path) -> Self {
        BpfPath::of(bpf_root).map_or_else(|| Self::Path(bpf_root.to_owned()), Self::Folder)
    }

    /// Where the folder is in this mount namespace; `None` where no BPF file system here shows it.
    pub fn bpf_root(&self) -> Option<PathBuf> {
        match self {
            Self::Folder(folder) => folder.here(),
            Self::Path(path) if BpfPath::of(path).is_some() => Some(path.clone()),
            Self::Path(path) => BpfPath::usual(path)?.here(),
            Self::Untold => None,
        }
    }

    /// Whether it means the folder at this path.
    pub fn is_of(&self, bpf_root: &Path) -> bool {
        let is_path = matches!(self, Self::Path(path) if path == bpf_root);
        let folder = || self.bpf_root().and_then(|path| BpfPath::of(&path));
        is_path || folder().is_some_and(|folder| BpfPath::of(bpf_root) == Some(folder))
    }

    /// What a comment can hold of it and `nft -f` takes back.
    fn text(&self) -> Option<String> {
        let text = match self {
            Self::Folder(folder) => Some(format!("{FOLDER}{folder}")),
            Self::Path(path) => path.to_str().map(str::to_owned),
            Self::Untold => None,
        };
        text.filter(|text| text.len() <= MOST && !text.contains(|c: char| c == '"' || c.is_control()))
    }

    /// As it is once it was written and read.
    fn as_read(&self) -> Self {
        self.text().map_or(Self::Untold, |text| Self::parse(&text))
    }

    /// Of a table's userdata.
    fn of(userdata: &[u8]) -> Self {
        let text = userdata.get(2..).and_then(|text| str::from_utf8(text.strip_suffix(b"\0")?).ok());
        text.map_or(Self::Untold, Self::parse)
    }

    fn parse(text: &str) -> Self {
        match text.strip_prefix(FOLDER).map(str::parse) {
            Some(Ok(folder)) => Self::Folder(folder),
            None if text.starts_with('/') => Self::Path(text.into()),
            _ => Self::Untold,
        }
    }
}

impl Display for Mark {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => {
                write!(f, "{} of the BPF file system {}", folder.folder().display(), folder.device())
            }
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Untold => f.write_str("a place that the mark does not name"),
        }
    }
}

/// The table, with this comment: `nftnl` knows none of tables.
struct Table<'a>(Option<&'a str>);

// SAFETY: it writes one message, which is far smaller than the largest.
unsafe impl NlMsg for Table<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, change: MsgType) {
        let kind = match change {
            MsgType::Add => libc::NFT_MSG_NEWTABLE,
            MsgType::Del => libc::NFT_MSG_DELTABLE,
        };
        let family = protocol_family(Family::V4) as u16;
        let userdata = self.0.map(comment);
        // SAFETY: the caller gives a buffer for the largest message, and both attributes are valid for their lengths.
        unsafe {
            let header = sys::nftnl_nlmsg_build_hdr(buffer.cast(), kind as u16, family, 0, seq).cast();
            mnl_attr_put_strz(header, TABLE_NAME, NAME.as_ptr());
            if let Some(userdata) = userdata {
                mnl_attr_put(header, TABLE_USERDATA, userdata.len(), userdata.as_ptr().cast());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_as_it_was_written() {
        let path = |path: &str| Mark::Path(path.into());
        for (mark, text) in [
            (path("/sys/fs/bpf/kube-lane"), "/sys/fs/bpf/kube-lane"),
            (Mark::Folder("0:35 /kube-lane".parse().unwrap()), "bpf 0:35 /kube-lane"),
        ] {
            assert_eq!(mark.text().as_deref(), Some(text));
            assert_eq!(Mark::of(&comment(text)), mark);
            assert_eq!(mark.as_read(), mark);
        }
        assert_eq!(Mark::of(&[]), Mark::Untold);
        assert_eq!(Mark::of(&comment("bpf x")), Mark::Untold);
        assert_eq!(Mark::of(&comment("not ours")), Mark::Untold);
        for odd in ["/a\"b", "/a\nb", &"x".repeat(MOST + 1)] {
            assert_eq!(path(odd).as_read(), Mark::Untold);
        }
    }

    #[test]
    fn a_path_means_itself() {
        assert!(Mark::Path("/sys/fs/bpf/kube-lane".into()).is_of(Path::new("/sys/fs/bpf/kube-lane")));
        assert!(!Mark::Path("/sys/fs/bpf/kube-lane".into()).is_of(Path::new("/nowhere")));
        assert!(!Mark::Untold.is_of(Path::new("/sys/fs/bpf/kube-lane")));
        assert!(!Mark::Folder("0:0 /kube-lane".parse().unwrap()).is_of(Path::new("/sys/fs/bpf/kube-lane")));
    }
}
