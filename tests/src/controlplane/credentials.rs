//! Keys, certificates, tokens and kubeconfigs of one control plane, made afresh in its folder.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use serde_json::json;

/// Files in the folder, as kube-apiserver's flags name them.
pub(super) const SERVER_CERTIFICATE: &str = "server.crt";
pub(super) const SERVER_KEY: &str = "server.key";
pub(super) const SERVICE_ACCOUNT_KEY: &str = "service-account.key";
pub(super) const SERVICE_ACCOUNT_PUBLIC_KEY: &str = "service-account.pub";
pub(super) const TOKENS: &str = "tokens.csv";
pub(super) const AUTHORITY: &str = "ca.crt";

/// What a client needs to know.
#[derive(Debug)]
pub(super) struct Credentials {
    authority: PathBuf,
    /// Good for everything: its group is `system:masters`.
    pub(super) admin_token: String,
}

impl Credentials {
    /// Writes all files that kube-apiserver reads to `dir`; its certificate is good for `address`, for the
    /// loopback addresses and for `extra_sans`.
    pub(super) fn create(dir: &Path, address: IpAddr, extra_sans: &[String]) -> Result<Self> {
        let mut authority = CertificateParams::new(vec![])?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        authority.distinguished_name.push(DnType::CommonName, "kube-lane test authority");
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;

        let mut sans = vec![address.to_string(), "localhost".into(), "127.0.0.1".into(), "::1".into()];
        sans.extend(["kubernetes".into(), "kubernetes.default.svc".into()]);
        sans.extend(extra_sans.iter().cloned());
        let server_key = KeyPair::generate()?;
        let server = CertificateParams::new(sans)?.signed_by(&server_key, &authority)?;

        let service_account_key = KeyPair::generate()?;
        // Any string will do where only this test can connect.
        let admin_token = "kube-lane-test-admin".to_owned();
        for (file, content) in [
            (AUTHORITY, authority.pem()),
            (SERVER_CERTIFICATE, server.pem()),
            (SERVER_KEY, server_key.serialize_pem()),
            (SERVICE_ACCOUNT_KEY, service_account_key.serialize_pem()),
            (SERVICE_ACCOUNT_PUBLIC_KEY, service_account_key.public_key_pem()),
            (TOKENS, format!("{admin_token},admin,admin,system:masters\n")),
        ] {
            fs::write(dir.join(file), content)?;
        }
        Ok(Self { authority: dir.join(AUTHORITY), admin_token })
    }

    /// Writes a kubeconfig for the server at `address` and the bearer of `token`.
    pub(super) fn write_kubeconfig(&self, path: &Path, address: SocketAddr, token: &str) -> Result<()> {
        let cluster = json!({
            "server": format!("https://{address}"),
            "certificate-authority": self.authority,
        });
        let kubeconfig = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        });
        // JSON is YAML.
        Ok(fs::write(path, serde_json::to_vec_pretty(&kubeconfig)?)?)
    }
}
