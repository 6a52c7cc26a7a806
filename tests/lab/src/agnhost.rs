//! Requests to `agnhost netexec` over HTTP: one line of text is the whole answer.
//!
//! Owns as much of HTTP/1.1 as that takes. Never follows a redirect, never reads a body without a length.

use std::io::{self, BufRead, BufReader, Read, Write};

/// Asks for `/path` on a connection that stays open, and returns the body.
pub(crate) fn get<S: Read + Write>(stream: &mut BufReader<S>, path: &str) -> io::Result<String> {
    write!(stream.get_mut(), "GET /{path} HTTP/1.1\r\nHost: agnhost\r\n\r\n")?;
    let status = read_line(stream)?;
    if status.split(' ').nth(1) != Some("200") {
        return Err(io::Error::other(format!("GET /{path}: {status}")));
    }
    let mut length = None;
    loop {
        let header = read_line(stream)?;
        match header.split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().ok();
            }
            None if header.is_empty() => break,
            _ => {}
        }
    }
    let length: usize = length.ok_or_else(|| io::Error::other("no Content-Length"))?;
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    String::from_utf8(body).map_err(|_| io::ErrorKind::InvalidData.into())
}

fn read_line(stream: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let Some(line) = line.strip_suffix("\r\n") else { return Err(io::ErrorKind::UnexpectedEof.into()) };
    Ok(line.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection on which the answer already waits.
    struct Canned(&'static [u8], Vec<u8>);

    impl Read for Canned {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.read(buffer)
        }
    }

    impl Write for Canned {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn answered(answer: &'static str) -> io::Result<String> {
        get(&mut BufReader::new(Canned(answer.as_bytes(), vec![])), "hostname")
    }

    #[test]
    fn the_body_is_as_long_as_its_header_says() {
        assert_eq!(answered("HTTP/1.1 200 OK\r\nContent-length: 5\r\n\r\nweb-1rest").unwrap(), "web-1");
    }

    #[test]
    fn a_connection_that_ends_early_was_reset() {
        let error = answered("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwe").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(answered("").unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn another_status_is_named() {
        let error = answered("HTTP/1.1 503 Service Unavailable\r\n\r\n").unwrap_err();
        assert!(error.to_string().contains("503"), "{error}");
    }
}
