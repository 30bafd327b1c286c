//! Images as files: an OCI image layout, or the older form of `docker save`, in a directory.
//!
//! A blob is named by its digest and checked against it before it is used.

use super::{ImportError, bad, failed};
use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Component, Path, PathBuf};

/// Longest description that is read.
const MAX_JSON: u64 = 8 << 20;
/// Most layers of an image.
const MAX_LAYERS: usize = 512;
/// How deep an index may name another.
const MAX_DEPTH: u8 = 4;

/// What an image says of its processes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Config {
    pub(super) env: Vec<String>,
    pub(super) workdir: Option<String>,
    pub(super) entrypoint: Vec<String>,
}

/// An image that can be unpacked.
#[derive(Debug)]
pub(super) struct Image {
    /// Tarballs, lowest first, with the digest that each must have.
    pub(super) layers: Vec<(PathBuf, Option<String>)>,
    pub(super) config: Config,
    /// What the image is, in a few characters.
    pub(super) id: String,
}

/// Whether the directory holds an image rather than a root file system.
pub(super) fn is_image(directory: &Path) -> bool {
    directory.join("oci-layout").is_file() || directory.join("manifest.json").is_file()
}

/// The image in this directory, for this processor.
pub(super) fn open(directory: &Path) -> Result<Image, ImportError> {
    if directory.join("oci-layout").is_file() {
        let path = directory.join("index.json");
        let index = ImageIndex::from_reader(read_json(&path)?.as_slice()).map_err(understand(&path))?;
        return of_index(directory, &index, MAX_DEPTH);
    }
    of_docker(directory)
}

fn of_index(directory: &Path, index: &ImageIndex, depth: u8) -> Result<Image, ImportError> {
    let fits = |descriptor: &&Descriptor| {
        descriptor
            .platform()
            .as_ref()
            .is_none_or(|platform| *platform.os() == Os::Linux && *platform.architecture() == Arch::Amd64)
    };
    let descriptor = index.manifests().iter().find(fits);
    let descriptor = descriptor.ok_or_else(|| bad(directory, "has no image for linux/amd64"))?;
    let path = checked_blob(directory, descriptor)?;
    let json = read_json(&path)?;
    if *descriptor.media_type() == MediaType::ImageIndex {
        let depth = depth
            .checked_sub(1)
            .ok_or_else(|| bad(&path, "is an index in an index in an index"))?;
        let index = ImageIndex::from_reader(json.as_slice()).map_err(understand(&path))?;
        return of_index(directory, &index, depth);
    }
    let manifest = ImageManifest::from_reader(json.as_slice()).map_err(understand(&path))?;
    let config_path = checked_blob(directory, manifest.config())?;
    let layers = manifest.layers().iter().map(|layer| {
        let digest = hex_of(layer)?;
        Ok((blob(directory, &digest), Some(digest)))
    });
    Ok(Image {
        layers: bounded(directory, layers.collect::<Result<_, ImportError>>()?)?,
        config: config(&config_path)?,
        id: hex_of(descriptor)?,
    })
}

/// `manifest.json` of `docker save` before it wrote image layouts.
#[derive(Deserialize)]
struct DockerManifest {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "Layers")]
    layers: Vec<String>,
}

fn of_docker(directory: &Path) -> Result<Image, ImportError> {
    let path = directory.join("manifest.json");
    let manifests: Vec<DockerManifest> = serde_json::from_slice(&read_json(&path)?)
        .map_err(|error| bad(&path, format!("is no description of an image: {error}")))?;
    let [manifest] = manifests.as_slice() else {
        return Err(bad(
            &path,
            format!("names {} images, and has to name one", manifests.len()),
        ));
    };
    let config_path = below(directory, &manifest.config)?;
    let layers = manifest
        .layers
        .iter()
        .map(|layer| Ok((below(directory, layer)?, None)));
    let id = Sha256::digest(read_json(&config_path)?);
    Ok(Image {
        layers: bounded(directory, layers.collect::<Result<_, ImportError>>()?)?,
        config: config(&config_path)?,
        id: hex(&id),
    })
}

fn bounded<T>(directory: &Path, layers: Vec<T>) -> Result<Vec<T>, ImportError> {
    if layers.is_empty() || layers.len() > MAX_LAYERS {
        let what = format!("has {} layers, and has to have 1 to {MAX_LAYERS}", layers.len());
        return Err(bad(directory, what));
    }
    Ok(layers)
}

fn config(path: &Path) -> Result<Config, ImportError> {
    let config = ImageConfiguration::from_reader(read_json(path)?.as_slice()).map_err(understand(path))?;
    let Some(config) = config.config() else {
        return Ok(Config::default());
    };
    let mut entrypoint = config.entrypoint().clone().unwrap_or_default();
    entrypoint.extend(config.cmd().clone().unwrap_or_default());
    Ok(Config {
        env: config.env().clone().unwrap_or_default(),
        workdir: config.working_dir().clone().filter(|dir| !dir.is_empty()),
        entrypoint,
    })
}

fn understand(path: &Path) -> impl FnOnce(oci_spec::OciSpecError) -> ImportError {
    let path = path.to_owned();
    move |source| ImportError::Image {
        path,
        source: Box::new(source),
    }
}

fn read_json(path: &Path) -> Result<Vec<u8>, ImportError> {
    let mut json = Vec::new();
    let file = File::open(path).map_err(failed("open", path))?;
    file.take(MAX_JSON + 1)
        .read_to_end(&mut json)
        .map_err(failed("read", path))?;
    if json.len() as u64 > MAX_JSON {
        return Err(bad(path, "is too long"));
    }
    Ok(json)
}

/// A name that an image gives to one of its own files.
fn below(directory: &Path, name: &str) -> Result<PathBuf, ImportError> {
    let name = Path::new(name);
    if name.components().all(|part| matches!(part, Component::Normal(_))) {
        Ok(directory.join(name))
    } else {
        Err(bad(name, "leads out of the image"))
    }
}

fn blob(directory: &Path, digest: &str) -> PathBuf {
    directory.join("blobs/sha256").join(digest)
}

/// The digest becomes a file name, and so has to be one.
fn hex_of(descriptor: &Descriptor) -> Result<String, ImportError> {
    let text = descriptor.digest().to_string();
    let digest = text.strip_prefix("sha256:").filter(|hex| {
        hex.len() == 64
            && hex
                .bytes()
                .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    });
    digest
        .map(str::to_owned)
        .ok_or_else(|| bad(Path::new("index.json"), format!("{text:?} is no SHA-256 digest")))
}

fn checked_blob(directory: &Path, descriptor: &Descriptor) -> Result<PathBuf, ImportError> {
    let digest = hex_of(descriptor)?;
    let path = blob(directory, &digest);
    check(&path, &digest)?;
    Ok(path)
}

/// The file must have this digest.
pub(super) fn check(path: &Path, digest: &str) -> Result<(), ImportError> {
    let mut file = File::open(path).map_err(failed("open", path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => hasher.update(&buffer[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed("read", path)(error)),
        }
    }
    let found = hex(&hasher.finalize());
    if found == digest {
        Ok(())
    } else {
        Err(bad(path, format!("is damaged: its digest is {found}")))
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::fs;

    fn put(directory: &Path, content: &[u8]) -> Value {
        let digest = hex(&Sha256::digest(content));
        fs::create_dir_all(directory.join("blobs/sha256")).unwrap();
        fs::write(blob(directory, &digest), content).unwrap();
        json!({ "digest": format!("sha256:{digest}"), "size": content.len() })
    }

    fn with(mut descriptor: Value, key: &str, value: Value) -> Value {
        descriptor[key] = value;
        descriptor
    }

    const CONFIG: &str = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},
        "config":{"Env":["A=1"],"WorkingDir":"/srv","Entrypoint":["/bin/app"],"Cmd":["-x"]}}"#;

    /// An image layout; answers its layer's path.
    fn layout(directory: &Path) -> PathBuf {
        let layer = put(directory, b"layer");
        let path = blob(
            directory,
            layer["digest"].as_str().unwrap().trim_start_matches("sha256:"),
        );
        let layer = with(
            layer,
            "mediaType",
            json!("application/vnd.oci.image.layer.v1.tar"),
        );
        let config = put(directory, CONFIG.as_bytes());
        let config = with(
            config,
            "mediaType",
            json!("application/vnd.oci.image.config.v1+json"),
        );
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [layer],
            "mediaType": "application/vnd.oci.image.manifest.v1+json" });
        let manifest = put(directory, manifest.to_string().as_bytes());
        let manifest = with(
            manifest,
            "mediaType",
            json!("application/vnd.oci.image.manifest.v1+json"),
        );
        let other = with(
            manifest.clone(),
            "platform",
            json!({ "os": "linux", "architecture": "arm64" }),
        );
        let ours = with(
            manifest,
            "platform",
            json!({ "os": "linux", "architecture": "amd64" }),
        );
        let inner = json!({ "schemaVersion": 2, "manifests": [other, ours] });
        let inner = put(directory, inner.to_string().as_bytes());
        let inner = with(
            inner,
            "mediaType",
            json!("application/vnd.oci.image.index.v1+json"),
        );
        let index = json!({ "schemaVersion": 2, "manifests": [inner] });
        fs::write(directory.join("index.json"), index.to_string()).unwrap();
        fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        path
    }

    fn expected() -> Config {
        Config {
            env: vec!["A=1".to_owned()],
            workdir: Some("/srv".to_owned()),
            entrypoint: vec!["/bin/app".to_owned(), "-x".to_owned()],
        }
    }

    #[test]
    fn a_layout_is_followed_to_the_image_for_this_processor() {
        let dir = tempfile::tempdir().unwrap();
        let layer = layout(dir.path());
        assert!(is_image(dir.path()));
        let image = open(dir.path()).unwrap();
        assert_eq!(image.config, expected());
        assert_eq!(image.layers.len(), 1);
        assert_eq!(image.layers[0].0, layer);
        check(&layer, image.layers[0].1.as_deref().unwrap()).unwrap();
        fs::write(&layer, b"other").unwrap();
        assert!(check(&layer, image.layers[0].1.as_deref().unwrap()).is_err());
    }

    #[test]
    fn a_damaged_manifest_and_a_digest_that_is_a_path_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        layout(dir.path());
        for digest in ["sha256:../../../etc/passwd", "md5:00", "sha256:zz"] {
            let index = json!({ "schemaVersion": 2, "manifests": [{ "digest": digest, "size": 1,
                "mediaType": "application/vnd.oci.image.manifest.v1+json" }] });
            fs::write(dir.path().join("index.json"), index.to_string()).unwrap();
            assert!(open(dir.path()).is_err(), "{digest} was accepted");
        }
    }

    #[test]
    fn the_older_form_of_docker_save_is_understood_and_cannot_name_other_files() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("c.json"), CONFIG).unwrap();
        let write = |config: &str, layer: &str| {
            let manifest = json!([{ "Config": config, "RepoTags": ["x:1"], "Layers": [layer] }]);
            fs::write(dir.path().join("manifest.json"), manifest.to_string()).unwrap();
        };
        write("c.json", "abc/layer.tar");
        let image = open(dir.path()).unwrap();
        assert_eq!(
            (image.config, image.layers[0].0.clone()),
            (expected(), dir.path().join("abc/layer.tar"))
        );
        for (config, layer) in [("../c.json", "l"), ("/etc/passwd", "l"), ("c.json", "../l")] {
            write(config, layer);
            assert!(open(dir.path()).is_err());
        }
    }
}
