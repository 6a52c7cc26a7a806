//! Logs: `tracing` to standard error, as text or as JSON.

use std::io::{self, IsTerminal};

use tracing::Level;
use tracing_subscriber::EnvFilter;

use crate::config::{LogFormat, Logging};

/// What the libraries may say: their watch errors are reported, once, by our own sources.
const LIBRARIES: &str = "warn,kube_client=error,kube_runtime=error";

/// Logging that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `--log-level` is neither a level nor a filter.
    #[error("--log-level: {value:?} is no log filter{}; write error, warn, info, debug or trace, or a filter like \
             info,kube_lane::source=debug", detail(.source))]
    Filter {
        /// What was written.
        value: String,
        /// What the filter's parser says, where it looked like a filter.
        source: Option<tracing_subscriber::filter::ParseError>,
    },
    /// Telemetry was started twice.
    #[error("logging is already set up")]
    AlreadySet(#[from] tracing::subscriber::SetGlobalDefaultError),
}

fn detail(source: &Option<tracing_subscriber::filter::ParseError>) -> String {
    source.as_ref().map(|source| format!(" ({source})")).unwrap_or_default()
}

/// Starts logging to standard error, for the whole process.
///
/// # Errors
/// When the filter is not one, or when logging was started before.
pub fn init(logging: &Logging) -> Result<(), TelemetryError> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter(logging)?)
        .with_writer(io::stderr)
        .with_target(false);
    match logging.format {
        LogFormat::Human => {
            tracing::subscriber::set_global_default(builder.with_ansi(io::stderr().is_terminal()).finish())?;
        }
        LogFormat::Json => {
            tracing::subscriber::set_global_default(builder.json().flatten_event(true).finish())?;
        }
    }
    Ok(())
}

/// klog's verbosity 0 to 3 is our `info`, 4 and 5 `debug`, 6 and above `trace`, of our own crate alone.
fn filter(logging: &Logging) -> Result<EnvFilter, TelemetryError> {
    let own = |level: Level| EnvFilter::new(format!("{LIBRARIES},kube_lane={level}"));
    let Some(value) = &logging.level else {
        return Ok(own(match logging.verbosity {
            0..=3 => Level::INFO,
            4..=5 => Level::DEBUG,
            6.. => Level::TRACE,
        }));
    };
    if let Ok(level) = value.trim().parse() {
        return Ok(own(level));
    }
    // A single word that is no level would be taken for a module's name, and silence everything else.
    if !value.contains(['=', ',']) {
        return Err(TelemetryError::Filter { value: value.clone(), source: None });
    }
    EnvFilter::builder()
        .parse(value)
        .map_err(|source| TelemetryError::Filter { value: value.clone(), source: Some(source) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(verbosity: u32, level: Option<&str>) -> Result<String, String> {
        let logging = Logging { verbosity, level: level.map(str::to_owned), ..Logging::default() };
        filter(&logging).map(|filter| filter.to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn verbosity_raises_our_own_level_alone() {
        for (verbosity, level) in [(0, "info"), (2, "info"), (4, "debug"), (6, "trace"), (10, "trace")] {
            let filter = shown(verbosity, None).unwrap();
            assert!(filter.contains(&format!("kube_lane={level}")), "{filter}");
            assert!(filter.contains("kube_runtime=error"), "{filter}");
        }
    }

    #[test]
    fn a_level_or_a_filter_goes_before_verbosity() {
        assert!(shown(6, Some("warn")).unwrap().contains("kube_lane=warn"));
        assert_eq!(shown(0, Some("kube_lane::source=trace")).unwrap(), "kube_lane::source=trace");
    }

    #[test]
    fn a_filter_that_is_none_is_refused_with_a_remedy() {
        for level in ["debugg", "kube_lane=loud", "a=b=c"] {
            let error = shown(0, Some(level)).unwrap_err();
            assert!(error.contains(level) && error.contains("write error, warn"), "{error}");
        }
    }
}
