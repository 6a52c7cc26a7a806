//! The mark of the socket layer: while that may be attached, an empty table beside ours whose comment says where it is
//! pinned. An agent that does without the layer, and cannot see the pins, learns of them there.
//!
//! Owns the table `ip kube-lane-socket`. Never decides when it comes or goes. It is no part of the ruleset: that may be
//! replaced while the mark stays.

use std::ffi::{CStr, c_void};
use std::fmt::{self, Display, Formatter};
use std::path::{Path, PathBuf};

use mnl::mnl_sys::{mnl_attr_put, mnl_attr_put_strz};
use nftnl::nftnl_sys::{self as sys, libc};
use nftnl::{MsgType, NlMsg};

use super::NftablesError;
use super::failure::{Owner, fatal};
use super::message::{comment, protocol_family};
use super::netlink::{Netlink, TABLE_NAME, TABLE_USERDATA};
use super::observe::again;
use crate::model::input::Family;

const NAME: &CStr = c"kube-lane-socket";
/// The most that `nft -f` takes as a comment, in bytes.
const MOST: usize = 127;

/// What a mark says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Where the layer is pinned; `None`: a path that a comment cannot hold.
    pub bpf_root: Option<PathBuf>,
}

/// The place of the mark in the current network namespace.
pub struct Marks {
    netlink: Netlink,
}

impl Marks {
    /// Opens it.
    ///
    /// # Errors
    /// [`NftablesError::Socket`].
    pub fn open() -> Result<Self, NftablesError> {
        Ok(Self { netlink: Netlink::open(false)? })
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
        let mark = Mark { bpf_root: Some(bpf_root.to_owned()) };
        if self.read()?.is_none_or(|found| found != mark.as_read()) {
            self.replace(Some(&mark))?;
        }
        Ok(())
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
            transaction.object(&Table(mark.text()), MsgType::Add, Owner::Ruleset);
        }
        let result = self.netlink.commit(&mut transaction);
        result.map(drop).map_err(|error| fatal(error, NftablesError::Ruleset))
    }
}

impl Mark {
    /// What a comment can hold of it and `nft -f` takes back.
    fn text(&self) -> Option<&str> {
        let text = self.bpf_root.as_deref().and_then(Path::to_str);
        text.filter(|text| text.len() <= MOST && !text.contains(|c: char| c == '"' || c.is_control()))
    }

    /// As it is once it was written and read.
    fn as_read(&self) -> Self {
        Self { bpf_root: self.text().map(PathBuf::from) }
    }

    /// Of a table's userdata.
    fn of(userdata: &[u8]) -> Self {
        let text = userdata.get(2..).and_then(|text| str::from_utf8(text.strip_suffix(b"\0")?).ok());
        Self { bpf_root: text.map(PathBuf::from) }
    }
}

impl Display for Mark {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match &self.bpf_root {
            Some(root) => write!(f, "{}", root.display()),
            None => f.write_str("a place that the mark has no room for"),
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
        let mark = |path: &str| Mark { bpf_root: Some(path.into()) };
        let root = mark("/sys/fs/bpf/kube-lane");
        assert_eq!(root.text(), Some("/sys/fs/bpf/kube-lane"));
        assert_eq!(Mark::of(&comment(root.text().unwrap())), root);
        assert_eq!(Mark::of(&[]), Mark { bpf_root: None });
        for odd in ["/a\"b", "/a\nb", &"x".repeat(MOST + 1)] {
            assert_eq!(mark(odd).as_read(), Mark { bpf_root: None });
        }
    }
}
