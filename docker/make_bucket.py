"""Make the bucket of MLflow's files where there is none; shows at once whether the store answers and the key fits."""

import os

import boto3
from botocore.exceptions import ClientError

bucket = os.environ["BUCKET"]
store = boto3.client("s3")
try:
    store.head_bucket(Bucket=bucket)
    print(f"{bucket} is there")
except ClientError as error:
    if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
        raise
    store.create_bucket(Bucket=bucket)
    print(f"{bucket} was made")
