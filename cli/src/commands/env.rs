//! `env`: lines for a shell that point an SDK at this host.

use super::Context;
use crate::args::{Global, Sdk};
use crate::output;
use anyhow::Context as _;
use http::Method;
use std::fmt::Write as _;
use torpor_api::http::Endpoints;

/// A value that a shell takes as it stands.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\'', r"'\''"))
}

fn host_of(url: &str) -> &str {
    let authority = url.rsplit("//").next().unwrap_or(url);
    authority.rsplit_once(':').map_or(authority, |(host, _)| host)
}

fn lines(sdk: Sdk, endpoints: &Endpoints, token: &str) -> anyhow::Result<String> {
    let (url, names) = match sdk {
        Sdk::Morph => (&endpoints.morph, ("MORPH_BASE_URL", "MORPH_API_KEY")),
        Sdk::Nullspace => (&endpoints.nullspace, ("NULLSPACE_API_URL", "NULLSPACE_API_KEY")),
    };
    let url = url
        .as_deref()
        .context("torpord does not listen for this SDK: set its address in [api] of torpord.toml")?;
    let mut pairs = vec![(names.0, url.to_owned()), (names.1, token.to_owned())];
    if let (Sdk::Morph, Some(ssh)) = (sdk, &endpoints.ssh) {
        pairs.push(("MORPH_SSH_HOSTNAME", ssh.host.clone()));
        pairs.push(("MORPH_SSH_PORT", ssh.port.to_string()));
    }
    let mut text = String::new();
    for (name, value) in pairs {
        writeln!(text, "export {name}={}", quoted(&value))?;
    }
    // A proxy of the user's is not the way to this host.
    for name in ["NO_PROXY", "no_proxy"] {
        let host = host_of(url);
        writeln!(text, "export {name}=\"${{{name}:+${name},}}{host}\"")?;
    }
    Ok(text)
}

/// Prints the lines.
pub(super) async fn run(context: &Context, global: &Global, sdk: Sdk) -> anyhow::Result<u8> {
    let answer = context.client.call(Method::GET, "/v1/endpoints").await?;
    let endpoints: Endpoints = context.client.read(&answer)?;
    let token = match &global.token {
        Some(token) => token.clone(),
        None => {
            let file = global.token_file.as_ref().unwrap_or(&endpoints.token_file);
            std::fs::read_to_string(file)
                .with_context(|| format!("cannot read the token file {}", file.display()))?
        }
    };
    output::print(lines(sdk, &endpoints, token.trim())?.as_bytes())?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use torpor_api::http::SshEndpoint;

    #[test]
    fn a_shell_reads_the_lines_back_as_they_were_meant() {
        let endpoints = Endpoints {
            morph: Some("http://127.0.0.1:7071".to_owned()),
            ssh: Some(SshEndpoint {
                host: "127.0.0.1".to_owned(),
                port: 7022,
            }),
            ..Endpoints::default()
        };
        let text = lines(Sdk::Morph, &endpoints, "a'b $c").unwrap();
        let script = format!(
            "NO_PROXY=x\n{text}\nprintf '%s|' \"$MORPH_BASE_URL\" \"$MORPH_API_KEY\" \"$MORPH_SSH_HOSTNAME\" \
             \"$MORPH_SSH_PORT\" \"$NO_PROXY\""
        );
        let output = std::process::Command::new("sh")
            .args(["-c", &script])
            .env_remove("NO_PROXY")
            .output()
            .unwrap();
        let read = String::from_utf8(output.stdout).unwrap();
        assert_eq!(read, "http://127.0.0.1:7071|a'b $c|127.0.0.1|7022|x,127.0.0.1|");
        assert!(lines(Sdk::Nullspace, &endpoints, "t").is_err());
    }
}
