//! A list in protobuf, read as it arrives: one object in memory at a time, however many there are.
//!
//! Owns the frame around the objects (`k8s.io/apimachinery/pkg/runtime`'s `Unknown`, and the fields that all lists
//! share). Never decodes an object: [`super::protobuf`] does.

use std::io;

use futures::{AsyncBufRead, AsyncReadExt};

/// What every protobuf body of the API begins with.
const MAGIC: [u8; 4] = *b"k8s\0";
/// `Unknown.raw`: the list itself.
const RAW: u64 = 2;
/// The fields of a list.
const METADATA: u64 = 1;
const ITEMS: u64 = 2;
/// Protobuf's wire type of everything that a list holds: a length, then so many bytes.
const LENGTH_DELIMITED: u64 = 2;
/// Far more than etcd takes for one object.
const LONGEST_PART: u64 = 16 << 20;

/// A list on its way in.
pub(super) struct List<R> {
    body: R,
    /// Bytes of the list that have not been read.
    left: u64,
    part: Vec<u8>,
}

/// A part of a list, undecoded.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part<'a> {
    /// The list's `metadata`.
    Metadata(&'a [u8]),
    /// One of its `items`.
    Item(&'a [u8]),
}

impl<R: AsyncBufRead + Unpin> List<R> {
    /// Reads up to where the list begins; `None` where the body is no protobuf.
    ///
    /// # Errors
    /// When the body breaks off or is malformed.
    pub(super) async fn begin(body: R) -> io::Result<Option<Self>> {
        let mut list = Self { body, left: u64::MAX, part: Vec::new() };
        let mut magic = [0; MAGIC.len()];
        match list.body.read_exact(&mut magic).await {
            // Whatever it is, it is shorter than any list.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        if magic != MAGIC {
            return Ok(None);
        }
        loop {
            let (field, len) = list.field().await?;
            if field == RAW {
                list.left = len;
                return Ok(Some(list));
            }
            list.read(len).await?;
        }
    }

    /// The next part; `None` where the list ends.
    ///
    /// # Errors
    /// When the body breaks off or is malformed.
    pub(super) async fn next(&mut self) -> io::Result<Option<Part<'_>>> {
        while self.left > 0 {
            let (field, len) = self.field().await?;
            self.read(len).await?;
            match field {
                METADATA => return Ok(Some(Part::Metadata(&self.part))),
                ITEMS => return Ok(Some(Part::Item(&self.part))),
                _ => {}
            }
        }
        Ok(None)
    }

    /// The number of the next field and the length of what it holds.
    async fn field(&mut self) -> io::Result<(u64, u64)> {
        let tag = self.varint().await?;
        let (field, wire_type) = (tag >> 3, tag & 7);
        if wire_type != LENGTH_DELIMITED {
            return Err(malformed("a field of an unexpected type"));
        }
        Ok((field, self.varint().await?))
    }

    async fn varint(&mut self) -> io::Result<u64> {
        let mut value = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let mut byte = [0];
            self.consume(1)?;
            self.body.read_exact(&mut byte).await?;
            value |= u64::from(byte[0] & 0x7f) << shift;
            if byte[0] & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(malformed("a number that does not end"))
    }

    async fn read(&mut self, len: u64) -> io::Result<()> {
        if len > LONGEST_PART {
            return Err(malformed("an object of an impossible size"));
        }
        self.consume(len)?;
        self.part.resize(len as usize, 0);
        self.body.read_exact(&mut self.part).await
    }

    fn consume(&mut self, len: u64) -> io::Result<()> {
        self.left = self.left.checked_sub(len).ok_or_else(|| malformed("a part longer than the whole"))?;
        Ok(())
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a malformed list: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    /// A field of so many bytes, as protobuf writes it.
    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2];
        let mut len = content.len();
        while len > 0x7f {
            out.push(len as u8 | 0x80);
            len >>= 7;
        }
        out.push(len as u8);
        out.extend(content);
        out
    }

    fn body(list: &[u8]) -> Vec<u8> {
        [&MAGIC[..], &field(1, b"type"), &field(2, list), &field(3, b""), &field(4, b"")].concat()
    }

    fn parts(body: &[u8]) -> io::Result<Vec<String>> {
        block_on(async {
            let mut list = List::begin(body).await?.expect("protobuf");
            let mut parts = Vec::new();
            while let Some(part) = list.next().await? {
                parts.push(match part {
                    Part::Metadata(bytes) => format!("metadata of {}", bytes.len()),
                    Part::Item(bytes) => format!("item of {}", bytes.len()),
                });
            }
            Ok(parts)
        })
    }

    #[test]
    fn a_list_comes_part_by_part() {
        let list = [field(1, b"version"), field(2, &[7; 300]), field(2, b""), field(9, b"new")].concat();
        assert_eq!(parts(&body(&list)).unwrap(), ["metadata of 7", "item of 300", "item of 0"]);
        assert_eq!(parts(&body(b"")).unwrap(), [""; 0]);
    }

    #[test]
    fn what_is_no_list_is_an_error() {
        assert!(block_on(List::begin(&b"{\"kind\": 1}"[..])).unwrap().is_none(), "JSON is told apart");
        let whole = body(&field(2, &[7; 300]));
        for len in 0..whole.len() - 4 {
            let broken = parts_of_broken(&whole[..len]);
            assert!(broken, "broken off after {len} bytes");
        }
        let lying = [&MAGIC[..], &field(2, &[2 << 3 | 2, 200, 1])].concat();
        assert!(parts(&lying).unwrap_err().to_string().contains("longer than the whole"));
        let endless = [&MAGIC[..], &[0xff; 12]].concat();
        assert!(parts(&endless).unwrap_err().to_string().contains("does not end"));
    }

    fn parts_of_broken(body: &[u8]) -> bool {
        block_on(async {
            let Ok(Some(mut list)) = List::begin(body).await else { return true };
            loop {
                match list.next().await {
                    Ok(None) => return false,
                    Ok(Some(_)) => {}
                    Err(_) => return true,
                }
            }
        })
    }
}
