//! The proxy in front of the API server, where there is one: `proxy-url` of a kubeconfig, else what the environment names
//! (`HTTPS_PROXY`, `HTTP_PROXY`, `NO_PROXY`), as client-go has it.
//!
//! Owns which proxy is taken. Never connects: `dial` does.

use std::fmt;
use std::net::IpAddr;

use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::{SocksV5, Tunnel};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};

/// A proxy that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} names no proxy that can be used: write http://HOST:PORT or socks5://HOST:PORT")]
pub struct ProxyError(String);

/// A proxy.
#[derive(Clone, Debug)]
pub(super) struct Proxy(Intercept);

/// Its address, without a password.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let uri = self.0.uri();
        write!(f, "{}://{}", uri.scheme_str().unwrap_or("http"), uri.authority().map_or("", |at| at.as_str()))
    }
}

/// How a connection to the server is made by way of it.
pub(super) enum Way {
    /// `CONNECT` of HTTP.
    Tunnel(Tunnel<HttpConnector>),
    /// SOCKS 5.
    Socks(SocksV5<HttpConnector>),
}

impl Proxy {
    /// The proxy that a kubeconfig names.
    pub(super) fn configured(url: &str) -> Result<Self, ProxyError> {
        let refused = || ProxyError(without_password(url));
        let uri: Uri = url.parse().map_err(|_| refused())?;
        // A proxy that is itself behind TLS would take a connector of its own.
        if !matches!(uri.scheme_str(), Some("http" | "socks5" | "socks5h")) || uri.host().is_none() {
            return Err(refused());
        }
        let server = Uri::from_static("https://server");
        Matcher::builder().all(url).build().intercept(&server).map(Self).ok_or_else(refused)
    }

    /// The proxy that the environment names for this server. Loopback addresses have none.
    pub(super) fn of_environment(
        server: &Uri,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Option<Result<Self, ProxyError>> {
        let host = server.host()?.trim_matches(['[', ']']);
        if host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback()) {
            return None;
        }
        let first = |names: [&str; 2]| names.into_iter().find_map(&variable).unwrap_or_default();
        let matcher = Matcher::builder()
            .http(first(["HTTP_PROXY", "http_proxy"]))
            .https(first(["HTTPS_PROXY", "https_proxy"]))
            .no(first(["NO_PROXY", "no_proxy"]))
            .build();
        let proxy = matcher.intercept(server).map(Self)?;
        let is_usable = matches!(proxy.0.uri().scheme_str(), Some("http" | "socks5" | "socks5h"));
        Some(if is_usable { Ok(proxy) } else { Err(ProxyError(proxy.to_string())) })
    }

    /// A connector that goes by way of it; `tcp` connects to the proxy itself.
    pub(super) fn way(&self, tcp: HttpConnector) -> Way {
        let uri = self.0.uri().clone();
        if !matches!(uri.scheme_str(), Some("socks5" | "socks5h")) {
            let tunnel = Tunnel::new(uri, tcp);
            return Way::Tunnel(match self.0.basic_auth() {
                Some(auth) => tunnel.with_auth(auth.clone()),
                None => tunnel,
            });
        }
        // Go's client has the proxy resolve names, whatever of the two is written.
        let socks = SocksV5::new(uri, tcp).local_dns(false);
        Way::Socks(match self.0.raw_auth() {
            Some((user, password)) => socks.with_auth(user.to_owned(), password.to_owned()),
            None => socks,
        })
    }
}

fn without_password(url: &str) -> String {
    match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://…@{host}"),
        _ => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kubeconfig_names_a_proxy_of_http_or_socks() {
        for (url, shown) in [
            ("http://192.0.2.1:3128", "http://192.0.2.1:3128"),
            ("socks5://proxy.example:1080", "socks5://proxy.example:1080"),
            ("http://user:secret@proxy.example:3128/", "http://proxy.example:3128"),
        ] {
            assert_eq!(Proxy::configured(url).unwrap().to_string(), shown, "{url}");
        }
        for url in ["https://user:secret@proxy.example", "proxy.example:3128", "ftp://a", "http://", ""] {
            let error = Proxy::configured(url).unwrap_err().to_string();
            assert!(error.contains("socks5://HOST:PORT") && !error.contains("secret"), "{url}: {error}");
        }
    }

    #[test]
    fn the_environment_names_a_proxy_for_what_it_does_not_leave_out() {
        let proxy = |server: &str, set: &[(&str, &str)]| {
            let variable = |name: &str| {
                set.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned())
            };
            let proxy = Proxy::of_environment(&server.parse().unwrap(), variable)?;
            Some(proxy.map_or_else(|error| error.to_string(), |proxy| proxy.to_string()))
        };
        let both = [("HTTPS_PROXY", "http://192.0.2.1:3128"), ("NO_PROXY", "10.0.0.0/8,.example,a.b")];
        assert_eq!(proxy("https://198.51.100.1:6443", &both).as_deref(), Some("http://192.0.2.1:3128"));
        for server in
            ["https://10.96.0.1", "https://api.example:6443", "https://a.b", "https://127.0.0.1:6443"]
        {
            assert_eq!(proxy(server, &both), None, "{server}");
        }
        assert_eq!(proxy("http://198.51.100.1", &both), None, "HTTPS_PROXY is for https");
        assert_eq!(proxy("https://[::1]:6443", &both), None);
        assert_eq!(proxy("https://198.51.100.1", &[]), None);
        let secure = proxy("https://198.51.100.1", &[("HTTPS_PROXY", "https://u:secret@a.example")]).unwrap();
        assert!(secure.contains("names no proxy that can be used") && !secure.contains("secret"), "{secure}");
        let small = [("https_proxy", "192.0.2.2:3128")];
        assert_eq!(proxy("https://198.51.100.1", &small).as_deref(), Some("http://192.0.2.2:3128"));
    }
}
