//! The objects that a scenario wants to be there, and bringing the API server to have just these.
//!
//! Owns the difference between two such states, and the requests. Knows nothing of proxies.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use kube::Client;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

use super::format::Step;
use super::names::Names;
use crate::cluster::{api, apply};

/// Kind, namespace and name.
type Id = (String, String, String);

/// Objects that are there, or ought to be.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Objects(BTreeMap<Id, Value>);

impl Objects {
    /// Puts an object in, in place of one with its name.
    pub(super) fn insert(&mut self, object: Value) {
        self.0.insert(id(&object), object);
    }

    /// All of them.
    pub(super) fn all(&self) -> impl Iterator<Item = &Value> {
        self.0.values()
    }

    /// Those that `keep` says yes to.
    pub(super) fn filter(&self, keep: impl Fn(&Value) -> bool) -> Self {
        Self(
            self.0.iter().filter(|(_, object)| keep(object)).map(|(id, o)| (id.clone(), o.clone())).collect(),
        )
    }

    /// What the step's changes make of them.
    pub(super) fn change(&mut self, step: &Step, names: &Names<'_>) -> Result<()> {
        for object in &step.apply {
            let mut object = names.object(object)?;
            names.complete(&mut object);
            self.insert(object);
        }
        for patch in &step.change {
            let patch = names.object(patch)?;
            let object = self.0.get_mut(&id(&patch)).with_context(|| format!("no such object: {patch}"))?;
            merge(object, &patch);
            names.complete(object);
        }
        for name in &step.delete {
            let wrong = || format!("`{name}`: what is deleted is named as in Service/web");
            let (kind, name) = name.split_once('/').with_context(wrong)?;
            let namespace = if kind == "ServiceCIDR" { String::new() } else { names.namespace.clone() };
            let gone = self.0.remove(&(kind.into(), namespace, names.text(name)?));
            ensure!(gone.is_some(), "{}: there is none", wrong());
        }
        Ok(())
    }

    /// Adds another's.
    pub(super) fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Has the API server hold these where it held `before`: what is gone or changed, all at once.
    pub(super) async fn push(&self, client: Client, before: &Self) -> Result<()> {
        let gone = before.0.iter().filter(|(id, _)| !self.0.contains_key(*id));
        try_join_all(gone.map(|(_, object)| delete(client.clone(), object))).await?;
        let changed = self.0.iter().filter(|(id, object)| before.0.get(*id) != Some(object));
        try_join_all(changed.map(|(id, object)| put(client.clone(), object, before.0.get(id)))).await?;
        Ok(())
    }
}

fn id(object: &Value) -> Id {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    (text(&object["kind"]), text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]))
}

/// RFC 7386, as `kubectl patch --type merge` does it.
fn merge(base: &mut Value, patch: &Value) {
    match (base, patch) {
        (Value::Object(base), Value::Object(patch)) => {
            for (name, value) in patch {
                if value.is_null() {
                    base.remove(name);
                } else {
                    merge(base.entry(name).or_insert_with(|| json!({})), value);
                }
            }
        }
        (base, patch) => *base = patch.clone(),
    }
}

async fn put(client: Client, object: &Value, before: Option<&Value>) -> Result<()> {
    apply(client.clone(), object).await?;
    // `apply` leaves a status alone that is no longer given.
    let has_ingress = |object: &Value| !object["status"]["loadBalancer"]["ingress"].is_null();
    if before.is_some_and(has_ingress) && !has_ingress(object) {
        let (api, name) = api(client, object);
        let none = json!({"status": {"loadBalancer": {"ingress": null}}});
        api.patch_status(&name, &PatchParams::default(), &Patch::Merge(none)).await?;
    }
    Ok(())
}

async fn delete(client: Client, object: &Value) -> Result<()> {
    let (api, name) = api(client, object);
    api.delete(&name, &DeleteParams::default()).await.with_context(|| format!("cannot delete {name}"))?;
    Ok(())
}
