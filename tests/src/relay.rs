//! One API server for several labs: a TCP relay on each node's loopback address, at the server's own address and port.
//!
//! Owns the copying of bytes. Labs share no wire, so this is the only way from one into the other.

use std::net::{SocketAddr, TcpListener};

use anyhow::Result;
use kube_lane_lab::Host;
use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

/// A relay; it ends when dropped.
#[derive(Debug)]
pub(crate) struct Relay(JoinHandle<()>);

impl Relay {
    /// Listens at `address` on the host, and connects to the same address from where `runtime`'s threads are.
    pub(crate) fn start(host: &Host, address: SocketAddr, runtime: &Handle) -> Result<Self> {
        let listener = host.run(move || {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            std::io::Result::Ok(listener)
        })??;
        let _entered = runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener)?;
        Ok(Self(runtime.spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                tokio::spawn(async move {
                    // Either end closes, or fails: the other hears of it by the end of its connection.
                    if let Ok(mut server) = TcpStream::connect(address).await {
                        let _ = copy_bidirectional(&mut client, &mut server).await;
                    }
                });
            }
        })))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.0.abort();
    }
}
