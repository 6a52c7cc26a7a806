//! As much SCTP as shows where a packet went: an INIT, answered by an INIT ACK whose cookie is the echo's answer.
//!
//! Owns these two packets (RFC 9260 §3.3.2, §3.3.3), over raw sockets, as kernels without an SCTP module have no
//! other. No association is ever made. What NAT and conntrack look at (ports, tags, checksum) is right.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const STATE_COOKIE: u16 = 7;
/// The common header, and an INIT's fixed part behind it.
const HEADER: usize = 12;
const FIXED: usize = 20;

/// A raw socket, which is used by the calls of a datagram socket; its ports mean nothing.
pub(crate) fn socket(family: IpAddr) -> io::Result<Socket> {
    let domain = if family.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_SCTP)))
}

/// An INIT or an INIT ACK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) source: u16,
    pub(crate) destination: u16,
    /// The initiate tag of the side that this packet goes to; 0 in an INIT.
    pub(crate) verification_tag: u32,
    /// The tag that the sender wants to see.
    pub(crate) initiate_tag: u32,
    /// The cookie of an INIT ACK; `None` in an INIT.
    pub(crate) cookie: Option<Vec<u8>>,
}

impl Packet {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut chunk = Vec::with_capacity(FIXED);
        chunk.extend(self.initiate_tag.to_be_bytes());
        // Receive window, streams out and in, first sequence number: any values that are allowed.
        chunk.extend(65536_u32.to_be_bytes());
        chunk.extend([0, 1, 0, 1]);
        chunk.extend(1_u32.to_be_bytes());
        if let Some(cookie) = &self.cookie {
            chunk.extend(STATE_COOKIE.to_be_bytes());
            chunk.extend(length(cookie.len() + 4));
            chunk.extend(cookie);
        }
        let mut packet = Vec::with_capacity(HEADER + FIXED + chunk.len());
        packet.extend(self.source.to_be_bytes());
        packet.extend(self.destination.to_be_bytes());
        packet.extend(self.verification_tag.to_be_bytes());
        packet.extend([0; 4]);
        packet.extend([if self.cookie.is_some() { INIT_ACK } else { INIT }, 0]);
        packet.extend(length(chunk.len() + 4));
        packet.extend(chunk);
        packet.resize(packet.len().next_multiple_of(4), 0);
        let checksum = crc32c(&packet).to_le_bytes();
        packet[8..HEADER].copy_from_slice(&checksum);
        packet
    }

    /// Reads a packet as a raw socket gives it: IPv4 with the IP header, IPv6 without. `None` for all else than an
    /// INIT or an INIT ACK with the right checksum.
    pub(crate) fn decode(received: &[u8], ipv4: bool) -> Option<Self> {
        let header = if ipv4 { usize::from(received.first()? & 15) * 4 } else { 0 };
        let packet = received.get(header..)?;
        let (head, chunk) = packet.split_at_checked(HEADER)?;
        let mut blank = packet.to_vec();
        blank[8..HEADER].fill(0);
        if crc32c(&blank).to_le_bytes() != head[8..] {
            return None;
        }
        let cookie = match *chunk.first()? {
            INIT => None,
            INIT_ACK => {
                let length = usize::from(u16_at(chunk, FIXED + 2)?);
                Some(chunk.get(FIXED + 4..FIXED + length)?.to_vec())
            }
            _ => return None,
        };
        Some(Self {
            source: u16_at(head, 0)?,
            destination: u16_at(head, 2)?,
            verification_tag: u32_at(head, 4)?,
            initiate_tag: u32_at(chunk, 4)?,
            cookie,
        })
    }
}

/// The client's half: one endpoint that sends INITs.
#[derive(Debug)]
pub(crate) struct Client {
    socket: UdpSocket,
    to: SocketAddr,
    port: u16,
}

impl Client {
    pub(crate) fn new(socket: Socket, to: SocketAddr, port: u16) -> Self {
        Self { socket: socket.into(), to, port }
    }

    pub(crate) fn socket(&self) -> &UdpSocket {
        &self.socket
    }

    pub(crate) fn local(&self) -> io::Result<SocketAddr> {
        Ok((self.socket.local_addr()?.ip(), self.port).into())
    }

    /// An INIT with this initiate tag.
    pub(crate) fn init(&self, tag: u32) -> Vec<u8> {
        let (source, destination) = (self.port, self.to.port());
        Packet { source, destination, verification_tag: 0, initiate_tag: tag, cookie: None }.encode()
    }

    /// The next INIT ACK's cookie; `None` for a packet that is none of ours.
    pub(crate) fn receive(&self, tag: u32) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = [0; 2048];
        let length = self.socket.recv(&mut buffer)?;
        let ours = |packet: &Packet| {
            (packet.source, packet.destination, packet.verification_tag) == (self.to.port(), self.port, tag)
        };
        Ok(Packet::decode(&buffer[..length], self.to.is_ipv4()).filter(ours).and_then(|packet| packet.cookie))
    }
}

fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// CRC-32C (Castagnoli), as RFC 9260 appendix A has it.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 * (crc & 1)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnolis() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn packets_are_read_as_they_were_written_and_damaged_ones_not_at_all() {
        for cookie in [None, Some(b"1 pod-a 10.0.0.1:1\n".to_vec())] {
            let packet = Packet { source: 1, destination: 2, verification_tag: 3, initiate_tag: 4, cookie };
            let mut bytes = packet.encode();
            assert_eq!(bytes.len() % 4, 0);
            assert_eq!(Packet::decode(&bytes, false).as_ref(), Some(&packet));
            for cut in 0..bytes.len() {
                assert_eq!(Packet::decode(&bytes[..cut], false), None);
            }
            bytes[1] ^= 1;
            assert_eq!(Packet::decode(&bytes, false), None);
        }
    }
}
