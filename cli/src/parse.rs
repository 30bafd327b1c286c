//! Durations, sizes and pairs as people write them.

use std::time::Duration;
use torpor_api::MachineName;
use torpor_api::http::{ServiceAuth, ServiceKind, ServiceSpec};

/// Why a text is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ParseError {
    #[error("expected a duration such as 90s, 15m, 1h30m or 2d")]
    Duration,
    #[error("expected a size such as 512M, 2G or 4K")]
    Size,
    #[error("expected a whole number of MiB, such as 512M or 2G")]
    SizeMib,
    #[error("expected KEY=VALUE")]
    Pair,
    #[error("expected PORT or PORT:NAME, with a port from 1 to 65535")]
    Publish,
    #[error(transparent)]
    Name(#[from] torpor_api::IdError),
}

/// A port to publish, and what to call it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Publish {
    port: u16,
    name: Option<MachineName>,
}

impl Publish {
    pub(crate) fn spec(&self, kind: ServiceKind) -> ServiceSpec {
        ServiceSpec {
            name: self.name.clone(),
            port: self.port,
            kind,
            auth: ServiceAuth::None,
            wake_deadline_ms: None,
        }
    }
}

/// `90`, `90s`, `1h30m`: whole seconds at the least.
pub(crate) fn duration(text: &str) -> Result<Duration, ParseError> {
    let mut seconds: u64 = 0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, tail) = rest.split_at(digits);
        let number: u64 = number.parse().map_err(|_| ParseError::Duration)?;
        let unit_len = tail.bytes().take_while(u8::is_ascii_lowercase).count();
        let (unit, tail) = tail.split_at(unit_len);
        let factor = match unit {
            "" if rest == text => 1,
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86_400,
            _ => return Err(ParseError::Duration),
        };
        let part = number.checked_mul(factor).ok_or(ParseError::Duration)?;
        seconds = seconds.checked_add(part).ok_or(ParseError::Duration)?;
        rest = tail;
    }
    if seconds == 0 {
        Err(ParseError::Duration)
    } else {
        Ok(Duration::from_secs(seconds))
    }
}

/// Likewise, or `0`.
pub(crate) fn duration_or_zero(text: &str) -> Result<Duration, ParseError> {
    if text == "0" {
        Ok(Duration::ZERO)
    } else {
        duration(text)
    }
}

/// `512M`, `2GiB`, `4k` or plain bytes.
pub(crate) fn size_bytes(text: &str) -> Result<u64, ParseError> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| ParseError::Size)?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(ParseError::Size),
    };
    number.checked_mul(1 << shift).ok_or(ParseError::Size)
}

/// A size that is a whole number of MiB; a plain number is MiB already.
pub(crate) fn size_mib(text: &str) -> Result<u32, ParseError> {
    if let Ok(mib) = text.parse::<u32>() {
        return if mib > 0 {
            Ok(mib)
        } else {
            Err(ParseError::SizeMib)
        };
    }
    let bytes = size_bytes(text)?;
    if bytes == 0 || bytes % (1 << 20) != 0 {
        return Err(ParseError::SizeMib);
    }
    u32::try_from(bytes >> 20).map_err(|_| ParseError::SizeMib)
}

/// `KEY=VALUE`; the value may be empty or hold more `=`.
pub(crate) fn pair(text: &str) -> Result<(String, String), ParseError> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        Some(_) | None => Err(ParseError::Pair),
    }
}

/// `PORT` or `PORT:NAME`.
pub(crate) fn publish(text: &str) -> Result<Publish, ParseError> {
    let (port, name) = match text.split_once(':') {
        Some((port, name)) => (port, Some(name.parse()?)),
        None => (text, None),
    };
    let port = port
        .parse()
        .ok()
        .filter(|port| *port > 0)
        .ok_or(ParseError::Publish)?;
    Ok(Publish { port, name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_add_up_and_nonsense_is_refused() {
        for (text, seconds) in [
            ("90", 90),
            ("90s", 90),
            ("15m", 900),
            ("1h30m", 5400),
            ("2d", 172_800),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in [
            "",
            "0",
            "m",
            "1x",
            "-5s",
            "1.5h",
            "1m30",
            "5 m",
            "99999999999999999999s",
            "9999999999999999d",
        ] {
            assert!(duration(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn sizes_are_powers_of_two_and_memory_is_whole_mebibytes() {
        assert_eq!(
            (size_mib("512M"), size_mib("2G"), size_mib("256")),
            (Ok(512), Ok(2048), Ok(256))
        );
        assert_eq!((size_bytes("4K"), size_bytes("17")), (Ok(4096), Ok(17)));
        for text in ["", "0", "1K", "0M", "1.5G", "M", "-1M", "99999999999T", "4096T"] {
            assert!(size_mib(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn ports_and_pairs_are_checked() {
        assert!(publish("8080").is_ok() && publish("8080:app").is_ok());
        for text in ["", "0", "65536", "8080:", "8080:A_B", ":app", "http"] {
            assert!(publish(text).is_err(), "{text:?}");
        }
        assert_eq!(pair("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert!(pair("a").is_err() && pair("=b").is_err());
    }
}
