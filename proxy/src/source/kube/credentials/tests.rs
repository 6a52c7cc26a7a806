//! Tokens in files, and credential plugins that are shell scripts.

use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::*;

/// A folder of one test.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kube-lane-credentials-{test}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// A plugin of these shell commands.
    fn plugin(&self, version: &str, script: &str) -> ExecConfig {
        let path = self.write("plugin", &format!("#!/bin/sh\n{script}\n"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        ExecConfig {
            api_version: Some(format!("client.authentication.k8s.io/{version}")),
            command: Some(path.display().to_string()),
            ..ExecConfig::default()
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// The header that a user's requests get.
fn authorization(mut auth: AuthInfo, plugin: &Plugin) -> Result<String, CredentialError> {
    block_on(async {
        let bearer = Bearer::of(&mut auth, plugin).await?.expect("something gives the token");
        Ok(bearer.header().await?.to_str().unwrap().to_owned())
    })
}

#[test]
fn a_token_in_a_file_is_trimmed_and_read_again() {
    let folder = Folder::new("file");
    let path = folder.write("token", "one\n");
    let with = |path: &Path, token: Option<&str>| AuthInfo {
        token_file: Some(path.display().to_string()),
        token: token.map(SecretString::from),
        ..AuthInfo::default()
    };
    assert_eq!(authorization(with(&path, Some("kubeconfig")), &Plugin::default()).unwrap(), "Bearer one");
    let absent = folder.0.join("absent");
    assert_eq!(
        authorization(with(&absent, Some("kubeconfig\n")), &Plugin::default()).unwrap(),
        "Bearer kubeconfig"
    );
    for (path, words) in [
        (absent, "cannot read the token file"),
        (folder.write("empty", "\n"), "is empty"),
        (folder.write("two", "a\nb\n"), "characters that no token has"),
    ] {
        let error = authorization(with(&path, None), &Plugin::default()).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(&path.display().to_string()), "{error}");
    }

    let mut file = TokenFile::open(path.clone(), None).unwrap();
    folder.write("token", "two");
    assert_eq!(file.token().expose_secret(), "one", "it is read each minute");
    file.read -= RELOAD * 2;
    assert_eq!(file.token().expose_secret(), "two");
    fs::remove_file(&path).unwrap();
    file.read -= RELOAD * 2;
    assert_eq!(file.token().expose_secret(), "two", "what cannot be read again is used as it was");
}

#[test]
fn a_token_in_the_kubeconfig_is_trimmed() {
    let mut auth = AuthInfo { token: Some("inline\n".into()), ..AuthInfo::default() };
    assert!(block_on(Bearer::of(&mut auth, &Plugin::default())).unwrap().is_none(), "kube sends it");
    assert_eq!(auth.token.unwrap().expose_secret(), "inline");
}

#[test]
fn a_plugin_is_asked_as_its_version_says_and_again_when_its_answer_expires() {
    let folder = Folder::new("plugin");
    let count = folder.0.join("count");
    for version in ["v1", "v1beta1"] {
        let _ = fs::remove_file(&count);
        // It gives a token that lasts for as long as its argument says.
        let script = format!(
            "echo \"$KUBERNETES_EXEC_INFO\" >>{count}\n\
             printf '{{\"kind\": \"ExecCredential\", \"apiVersion\": \"client.authentication.k8s.io/{version}\", \
             \"status\": {{\"token\": \"%s-%s\\\\n\", \"expirationTimestamp\": \"%s\"}}}}' \
             \"$NAME\" \"$(wc -l <{count})\" \"$(date -u -d \"$1\" +%Y-%m-%dT%H:%M:%SZ)\"",
            count = count.display(),
        );
        let variable = |name: &str, value: &str| {
            HashMap::from([("name".to_owned(), name.to_owned()), ("value".to_owned(), value.to_owned())])
        };
        let asked = |lasts: &str| ExecConfig {
            args: Some(vec![lasts.to_owned()]),
            env: Some(vec![variable("NAME", "mine")]),
            ..folder.plugin(version, &script)
        };
        let user = |exec: ExecConfig| AuthInfo { exec: Some(exec), ..AuthInfo::default() };
        let plugin = Plugin::default();
        assert_eq!(authorization(user(asked("1 hour")), &plugin).unwrap(), "Bearer mine-1", "{version}");
        assert_eq!(
            authorization(user(asked("1 hour")), &plugin).unwrap(),
            "Bearer mine-1",
            "once for all clients"
        );
        // Another configuration is another plugin; it expires so soon that the second request asks again.
        assert_eq!(authorization(user(asked("30 seconds")), &plugin).unwrap(), "Bearer mine-3", "{version}");
        let info = fs::read_to_string(&count).unwrap();
        let parts = ["\"ExecCredential\"", &format!("k8s.io/{version}\""), "\"interactive\":false"];
        assert!(parts.iter().all(|part| info.contains(part)), "{info}");
    }
}

#[test]
fn a_plugin_is_asked_again_when_the_server_refuses_its_answer() {
    let plugin = Plugin::default();
    let credential = Credential { token: Some("old".into()), identity: None };
    let answer = |at| Answer { asked: Value::Null, at, expires: None, credential: credential.clone() };
    let known = |at: Instant| {
        block_on(async {
            *plugin.0.lock().await = Some(answer(at));
            plugin.refused().await;
            plugin.0.lock().await.is_some()
        })
    };
    assert!(known(Instant::now()), "another watch has asked again");
    assert!(!known(Instant::now() - FRESH * 2));
}

#[test]
fn a_plugin_may_give_a_certificate() {
    let folder = Folder::new("certificate");
    let script = "printf 'kind: ExecCredential\\napiVersion: client.authentication.k8s.io/v1\\n\
                  status: {clientCertificateData: CERTIFICATE, clientKeyData: KEY}\\n'";
    let mut auth = AuthInfo { exec: Some(folder.plugin("v1", script)), ..AuthInfo::default() };
    assert!(block_on(Bearer::of(&mut auth, &Plugin::default())).unwrap().is_none());
    assert_eq!(auth.client_certificate_data.as_deref(), Some("Q0VSVElGSUNBVEU="));
    assert_eq!(auth.client_key_data.unwrap().expose_secret(), "S0VZ");
}

#[test]
fn a_plugin_that_gives_nothing_is_named_with_the_reason() {
    let folder = Folder::new("bad");
    let good = "kind: ExecCredential\\napiVersion: client.authentication.k8s.io/v1\\n";
    for (version, script, words) in [
        ("v1", "echo no session >&2; exit 3".to_owned(), "exit status: 3: no session"),
        ("v1", "echo hello".to_owned(), "no ExecCredential"),
        ("v1", format!("printf '{good}'"), "no status"),
        ("v1", format!("printf '{good}status: {{token: \"\"}}'"), "neither a token nor a certificate"),
        ("v1", format!("printf '{good}status: {{clientKeyData: a}}'"), "come together"),
        ("v1beta1", format!("printf '{good}status: {{token: a}}'"), "v1beta1 is configured"),
        ("v1alpha1", "true".to_owned(), "write client.authentication.k8s.io/v1 or"),
    ] {
        let exec = folder.plugin(version, &script);
        let command = exec.command.clone().unwrap();
        let user = AuthInfo { exec: Some(exec), ..AuthInfo::default() };
        let error = authorization(user, &Plugin::default()).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(&command), "{script}: {error}");
    }
    let absent = ExecConfig {
        command: Some("/nonexistent/plugin".into()),
        install_hint: Some("Install it.\n".into()),
        ..folder.plugin("v1", "")
    };
    let user = AuthInfo { exec: Some(absent.clone()), ..AuthInfo::default() };
    let error = authorization(user, &Plugin::default()).unwrap_err().to_string();
    assert!(error.contains("cannot be run") && error.ends_with(". Install it."), "{error}");
    let terminal = ExecConfig { interactive_mode: Some(ExecInteractiveMode::Always), ..absent };
    let user = AuthInfo { exec: Some(terminal), ..AuthInfo::default() };
    let error = authorization(user, &Plugin::default()).unwrap_err().to_string();
    assert!(error.contains("interactiveMode is Always"), "{error}");
}
