//! Edge tokens: `tpe1.<key>.<claims>.<mac>`, each part in an alphabet that needs no escaping in a URL or cookie.
//!
//! Pure: a token is made with a key and taken apart with the keys that are known. Whether its grant was revoked is
//! not in it.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use torpor_api::http::GrantTransport;
use torpor_api::{GrantId, MachineId};

/// What every token begins with.
pub const PREFIX: &str = "tpe1.";
/// A longer text is no token.
const MAX_TOKEN_BYTES: usize = 512;

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    /// The grant.
    #[serde(rename = "g")]
    pub grant: GrantId,
    /// The machine.
    #[serde(rename = "m")]
    pub machine: MachineId,
    /// Port in the guest.
    #[serde(rename = "p")]
    pub port: u16,
    /// What it is good for.
    #[serde(rename = "t")]
    pub transport: GrantTransport,
    /// Unix time of its end in milliseconds.
    #[serde(rename = "e")]
    pub expires_unix_ms: u64,
}

/// A text that is no token of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not have a token's form.
    #[error("it is not an edge token")]
    Malformed,
    /// Its key is none of this host's.
    #[error("it was signed with a key that this host does not have")]
    UnknownKey,
    /// Its MAC is wrong.
    #[error("its signature is wrong")]
    BadSignature,
}

/// The token for these claims.
#[must_use]
pub fn sign(key_id: &str, secret: &[u8], claims: &Claims) -> String {
    // Claims are plain values: they always serialise.
    let claims = URL_SAFE_NO_PAD.encode(serde_json::to_vec(claims).unwrap_or_default());
    let signed = format!("{PREFIX}{key_id}.{claims}");
    let mac = URL_SAFE_NO_PAD.encode(mac(secret, &signed).finalize().into_bytes());
    format!("{signed}.{mac}")
}

/// What the token says, if one of the keys vouches for it. Its time is not looked at.
///
/// # Errors
/// No key does.
pub fn verify<'k>(token: &str, secret_of: impl Fn(&str) -> Option<&'k [u8]>) -> Result<Claims, TokenError> {
    if token.len() > MAX_TOKEN_BYTES {
        return Err(TokenError::Malformed);
    }
    let (signed, sent_mac) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
    let rest = signed.strip_prefix(PREFIX).ok_or(TokenError::Malformed)?;
    let (key_id, claims) = rest.split_once('.').ok_or(TokenError::Malformed)?;
    let sent_mac = URL_SAFE_NO_PAD
        .decode(sent_mac)
        .map_err(|_| TokenError::Malformed)?;
    let secret = secret_of(key_id).ok_or(TokenError::UnknownKey)?;
    // Compared in constant time, and before anything in the token is believed.
    mac(secret, signed)
        .verify_slice(&sent_mac)
        .map_err(|_| TokenError::BadSignature)?;
    let claims = URL_SAFE_NO_PAD
        .decode(claims)
        .map_err(|_| TokenError::Malformed)?;
    serde_json::from_slice(&claims).map_err(|_| TokenError::Malformed)
}

fn mac(secret: &[u8], text: &str) -> Hmac<Sha256> {
    let mac = Hmac::<Sha256>::new_from_slice(secret);
    // HMAC takes keys of every length; one that did not would vouch for nothing.
    let mut mac = mac.unwrap_or_else(|_| Hmac::<Sha256>::new(&rand::random::<[u8; 64]>().into()));
    mac.update(text.as_bytes());
    mac
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn claims() -> Claims {
        Claims {
            grant: GrantId::generate(),
            machine: MachineId::generate(),
            port: 8080,
            transport: GrantTransport::Any,
            expires_unix_ms: 1_800_000_000_000,
        }
    }

    fn keys(id: &str) -> Option<&'static [u8]> {
        match id {
            "k1" => Some(b"one"),
            "k2" => Some(b"two"),
            _ => None,
        }
    }

    #[test]
    fn a_token_says_what_it_was_made_with_and_needs_no_escaping() {
        let claims = claims();
        let token = sign("k2", b"two", &claims);
        assert_eq!(verify(&token, keys), Ok(claims));
        assert!(
            token
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)),
            "{token}"
        );
        assert!(token.len() < MAX_TOKEN_BYTES / 2);
    }

    #[test]
    fn another_key_or_none_vouches_for_nothing() {
        let claims = claims();
        assert_eq!(
            verify(&sign("k1", b"two", &claims), keys),
            Err(TokenError::BadSignature)
        );
        assert_eq!(
            verify(&sign("k3", b"two", &claims), keys),
            Err(TokenError::UnknownKey)
        );
        for bad in [
            "",
            ".",
            "..",
            "tpe1.k1",
            "tpe1.k1.e30",
            "tpe1.k1.e30.!",
            "tpe2.k1.e30.AA",
        ] {
            assert_eq!(verify(bad, keys), Err(TokenError::Malformed), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_changed_token_is_taken(at in 0_usize..300, with in "[A-Za-z0-9_.-]") {
            let token = sign("k1", b"one", &claims());
            let at = at % token.len();
            let mut changed = token.clone();
            changed.replace_range(at..=at, &with);
            // The last character of base64 carries bits that mean nothing; a decoder that is strict refuses them.
            prop_assert!(changed == token || verify(&changed, keys).is_err(), "{changed}");
        }
    }
}
