//! Sizes, rates, durations and addresses as people write them in a file or on a command line.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr, time::Duration};

/// Why a text is not the quantity it should be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{text:?} is not {wanted}")]
pub struct QuantityError {
    text: String,
    wanted: &'static str,
}

/// A number of bytes: `64MiB`, `1.5GB`, `4096`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "Text", into = "String")]
pub struct Size(u64);

/// Bytes a second: `300MB/s`, `1GiB/s`, `10Gbit/s`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "Text", into = "String")]
pub struct Rate(u64);

/// A duration: `250ms`, `30s`, `15m`, `1h30m`, `2d`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "Text", into = "String")]
pub struct Span(Duration);

/// Where a service is reached: `host:port`, the host a name or an address.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "Text", into = "String")]
pub struct HostPort(String);

/// A value of the file before it is read: a text, or a bare number.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text or a whole number")]
enum Text {
    Text(String),
    Number(u64),
}

impl Text {
    fn parse<T: FromStr>(self) -> Result<T, T::Err> {
        match self {
            Self::Text(text) => text.parse(),
            Self::Number(number) => number.to_string().parse(),
        }
    }
}

const BYTE_UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
];
const BIT_UNITS: [(&str, u64); 4] =
    [("Tbit", 125_000_000_000), ("Gbit", 125_000_000), ("Mbit", 125_000), ("Kbit", 125)];
const TIME_UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// A decimal number times its unit, by name without regard to case; nothing where there is no such unit, or no room.
fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = unit.trim();
    let factor = match unit {
        "" => 1,
        _ => units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit))?.1,
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let mut sum = whole.parse::<u64>().ok()?.checked_mul(factor)?;
    if !part.is_empty() {
        let tenths = 10u64.checked_pow(u32::try_from(part.len()).ok()?)?;
        let part = u128::from(part.parse::<u64>().ok()?) * u128::from(factor) / u128::from(tenths);
        sum = sum.checked_add(u64::try_from(part).ok()?)?;
    }
    Some(sum)
}

/// A number in the largest unit that divides it.
fn shown(f: &mut fmt::Formatter<'_>, value: u64, units: &[(&str, u64)]) -> fmt::Result {
    let (unit, factor) = units
        .iter()
        .filter(|(_, factor)| value >= *factor && value.is_multiple_of(*factor))
        .fold(("B", 1), |best, (unit, factor)| if *factor > best.1 { (unit, *factor) } else { best });
    write!(f, "{}{unit}", value / factor)
}

impl Size {
    /// That many bytes.
    pub const fn bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let wanted = "a number of bytes such as 4096, 64MiB or 1.5GB";
        scaled(text, &BYTE_UNITS).map(Self).ok_or_else(|| QuantityError { text: text.into(), wanted })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        shown(f, self.0, &BYTE_UNITS)
    }
}

impl Rate {
    /// Bytes a second.
    pub const fn bytes_per_s(self) -> u64 {
        self.0
    }
}

impl FromStr for Rate {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let wanted = "a rate such as 300MB/s, 1GiB/s or 10Gbit/s";
        let amount = text.trim().strip_suffix("/s");
        let rate = amount.and_then(|amount| scaled(amount, &BYTE_UNITS).or_else(|| scaled(amount, &BIT_UNITS)));
        rate.map(Self).ok_or_else(|| QuantityError { text: text.into(), wanted })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        shown(f, self.0, &BYTE_UNITS)?;
        f.write_str("/s")
    }
}

impl Span {
    /// That many seconds.
    pub const fn secs(secs: u64) -> Self {
        Self(Duration::from_secs(secs))
    }

    /// From a duration; texts are exact to the millisecond.
    pub const fn of(duration: Duration) -> Self {
        Self(duration)
    }

    /// The duration.
    pub const fn get(self) -> Duration {
        self.0
    }
}

impl FromStr for Span {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let error = || QuantityError { text: text.into(), wanted: "a duration such as 250ms, 30s, 15m, 1h30m or 2d" };
        let mut millis = 0u64;
        let mut rest = text.trim();
        if rest.is_empty() {
            return Err(error());
        }
        while !rest.is_empty() {
            let unit = rest.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(error)?;
            let end = rest[unit..].find(|c: char| !c.is_ascii_alphabetic()).map_or(rest.len(), |end| unit + end);
            let part = scaled(&rest[..end], &TIME_UNITS).ok_or_else(error)?;
            millis = millis.checked_add(part).ok_or_else(error)?;
            rest = rest[end..].trim_start();
        }
        Ok(Self(Duration::from_millis(millis)))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut millis = self.0.as_millis();
        if millis == 0 {
            return f.write_str("0s");
        }
        for (unit, factor) in TIME_UNITS {
            let count = millis / u128::from(factor);
            millis %= u128::from(factor);
            if count > 0 {
                write!(f, "{count}{unit}")?;
            }
        }
        Ok(())
    }
}

impl HostPort {
    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name or address before the port.
    pub fn host(&self) -> &str {
        self.0.rsplit_once(':').map_or("", |(host, _)| host)
    }
}

impl FromStr for HostPort {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let error = || QuantityError { text: text.into(), wanted: "host:port" };
        let authority: hyper::http::uri::Authority = text.parse().map_err(|_| error())?;
        let sound = !authority.host().is_empty() && !text.contains('@') && authority.port_u16().is_some_and(|p| p != 0);
        sound.then(|| Self(text.into())).ok_or_else(error)
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<std::net::SocketAddr> for HostPort {
    fn from(addr: std::net::SocketAddr) -> Self {
        Self(addr.to_string())
    }
}

macro_rules! text_form {
    ($($quantity:ty),*) => {$(
        impl TryFrom<Text> for $quantity {
            type Error = QuantityError;

            fn try_from(text: Text) -> Result<Self, QuantityError> {
                text.parse()
            }
        }

        impl From<$quantity> for String {
            fn from(quantity: $quantity) -> Self {
                quantity.to_string()
            }
        }
    )*};
}
text_form!(Size, Rate, Span, HostPort);

#[cfg(test)]
mod tests {
    use super::*;

    fn refused<T: FromStr<Err = QuantityError> + fmt::Debug>(text: &str) {
        assert!(text.parse::<T>().is_err(), "{text:?} was taken");
    }

    #[test]
    fn sizes() {
        for (text, bytes, shown) in [
            ("4096", 4096, "4KiB"),
            ("64MiB", 64 << 20, "64MiB"),
            ("64 mib", 64 << 20, "64MiB"),
            ("1.5GB", 1_500_000_000, "1500MB"),
            ("0", 0, "0B"),
            ("1TiB", 1 << 40, "1TiB"),
            ("999", 999, "999B"),
        ] {
            let size: Size = text.parse().unwrap();
            assert_eq!((size.get(), size.to_string().as_str()), (bytes, shown), "{text}");
        }
        for bad in ["", "-1", "1.2.3", "1e3", "10Q", "GB", "99999999TiB", "1..", "1/s"] {
            refused::<Size>(bad);
        }
    }

    #[test]
    fn rates() {
        for (text, bytes, shown) in
            [("300MB/s", 300_000_000, "300MB/s"), ("10Gbit/s", 1_250_000_000, "1250MB/s"), ("1KiB/s", 1024, "1KiB/s")]
        {
            let rate: Rate = text.parse().unwrap();
            assert_eq!((rate.bytes_per_s(), rate.to_string().as_str()), (bytes, shown), "{text}");
        }
        for bad in ["300MB", "/s", "x/s"] {
            refused::<Rate>(bad);
        }
    }

    #[test]
    fn spans() {
        for (text, millis, shown) in [
            ("250ms", 250, "250ms"),
            ("30s", 30_000, "30s"),
            ("90s", 90_000, "1m30s"),
            ("1h30m", 5_400_000, "1h30m"),
            ("1.5s", 1_500, "1s500ms"),
            ("2d", 172_800_000, "2d"),
            ("0s", 0, "0s"),
        ] {
            let span: Span = text.parse().unwrap();
            assert_eq!((span.get(), span.to_string().as_str()), (Duration::from_millis(millis), shown), "{text}");
            assert_eq!(shown.parse::<Span>().unwrap(), span);
        }
        for bad in ["", "30", "s", "3y", "1h30", "-1s"] {
            refused::<Span>(bad);
        }
    }

    #[test]
    fn hosts() {
        for good in ["tracker:15003", "10.0.0.1:80", "[::1]:15003", "a.b-c.example:1"] {
            assert_eq!(good.parse::<HostPort>().unwrap().as_str(), good);
        }
        assert_eq!("[::1]:15003".parse::<HostPort>().unwrap().host(), "[::1]");
        for bad in ["tracker", ":1", "tracker:0", "tracker:99999", "a b:1", "http://a:1", "u@h:1", "a:1/x"] {
            refused::<HostPort>(bad);
        }
    }
}
